"""The same work on `bt` and on a peer: transformers' BridgeTower classes, or the scheme of the released code.

transformers' classes are run as their users run them: one image per text, one forward pass of a class per objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.bench.case import Case
from bt.bench.contrastive import contrastive
from bt.bench.data_cases import DATA_CASES
from bt.bench.memory import memory
from bt.bench.models import (
    PeerVQA,
    Size,
    Step,
    make_batch,
    make_model,
    make_ours,
    make_peer,
    make_step,
    make_vqa,
    pretraining_objectives,
)
from bt.bench.official import OFFICIAL, Scheme, make_scheme_step, prepare
from bt.bench.retrieval_cases import retrieval_all, retrieval_topk
from bt.data.batch import Batch
from bt.models.bridgetower import Need
from bt.tasks.base import Context, Objective
from bt.tasks.irtr import IRTR
from bt.tasks.itm import ITM
from bt.tasks.vqa import VQA


def peer_pretraining_step(peer: nn.ModuleDict, batch: Batch) -> Step:
    """One step of MLM + ITM of transformers' classes."""
    mlm, itm, texts = batch.targets["mlm"], batch.targets["itm"], batch.texts
    labels = torch.full_like(texts.ids, -100).masked_scatter(mlm["positions"], mlm["labels"])

    def losses() -> list[Tensor]:
        mask = texts.mask.long()
        matching = {"pixel_values": batch.images[batch.pairs[:, 0]], "input_ids": mlm["ids"], "attention_mask": mask}
        mixed = {"pixel_values": batch.images[itm["pairs"][:, 0]], "input_ids": texts.ids, "attention_mask": mask}
        return [peer["mlm"](**matching, labels=labels).loss, peer["itm"](**mixed, labels=itm["labels"]).loss]

    return Step(peer, losses)


def pretraining(size: Size, images: int, texts_per_image: int) -> Case:
    """One step of MLM + ITM with negatives from the batch, and AdamW."""
    peer, batch = make_peer(size), make_batch(size, images, texts_per_image)
    ours = make_step(make_ours(size, peer), batch)
    return Case(images * texts_per_image, ours, peer_pretraining_step(peer, batch), flops=True)


def against_released(
    size: Size, objectives: Callable[[Context], Mapping[str, Objective]], batch: Batch, count: int
) -> Case:
    """One step of these objectives, beside the same in the released scheme."""
    model = make_model(size, objectives)  # of both sides
    ours = make_step(model, batch, lambda: prepare(model, Scheme()))
    return Case(count, ours, make_scheme_step(model, batch, OFFICIAL, size.max_tokens), flops=True)


def pretraining_official(size: Size, images: int) -> Case:
    """MLM + ITM as the released recipe draws it: one text per image, a false image for half of the pairs."""
    batch = make_batch(size, images, 1, false_images=True)
    return against_released(size, pretraining_objectives, batch, images)


def irtr_batch(size: Size, images: int, texts: int) -> Batch:
    """Each image with one true caption and texts - 1 false ones, all different."""
    batch = make_batch(size, images, texts)
    rows = torch.arange(images * texts).view(images, texts)
    own, match = rows[:, 0], torch.arange(images) % 2 == 0
    mixed = torch.where(match, torch.arange(images), (torch.arange(images) + 1) % images)
    targets = {
        "irtr": {"texts": rows},
        "itm": {"pairs": torch.stack([mixed, own], 1), "labels": match.long()},
    }
    pairs = torch.stack([torch.arange(images), own], 1)
    return replace(batch, pairs=pairs, pair_ids=own, targets=targets)


def irtr(size: Size, images: int, texts: int = 16) -> Case:
    """16-way retrieval with its ITM, whose head is frozen, as in the released recipe."""
    size = size.for_finetuning
    return against_released(
        size,
        lambda context: {"irtr": IRTR(context, texts=texts - 1), "itm": ITM(context, frozen_head=True)},
        irtr_batch(size, images, texts),
        images * texts,
    )


def vqa(size: Size, images: int, questions: int) -> Case:
    """One step of VQA with AdamW."""
    size = size.for_finetuning
    peer, pairs = PeerVQA(size).train(), images * questions
    batch = make_batch(size, images, questions)
    scores = torch.rand(pairs, size.answers, generator=torch.Generator().manual_seed(1)) * (
        torch.arange(size.answers) % 7 == 0
    )
    batch.targets = {"vqa": {"scores": scores, "answered": torch.ones(pairs, dtype=torch.bool)}}
    model = make_vqa(size, peer, lambda context: {"vqa": VQA(context)})

    def losses() -> list[Tensor]:
        pixels, texts = batch.images[batch.pairs[:, 0]], batch.texts
        logits = peer(pixel_values=pixels, input_ids=texts.ids, attention_mask=texts.mask.long())
        return [F.binary_cross_entropy_with_logits(logits, scores) * size.answers]

    return Case(pairs, make_step(model, batch), Step(peer, losses), flops=True)


def inference(size: Size, questions: int) -> Case:
    """The fused [CLS] of one image with many texts."""
    peer = make_peer(size).eval()
    tower, trunk = make_ours(size, peer).eval().tower, peer["mlm"].bridgetower
    batch = make_batch(size, 1, questions)

    @torch.no_grad()
    def our_pass() -> Tensor:
        images, texts = tower.encode_images(batch.images), tower.encode_texts(batch.texts)
        return tower.fuse(images, texts, batch.pairs, Need(cls=True)).cls

    @torch.no_grad()
    def peer_pass() -> Tensor:
        pixels = batch.images.expand(questions, -1, -1, -1)
        return trunk(batch.texts.ids, batch.texts.mask.long(), pixel_values=pixels).pooler_output

    return Case(questions, our_pass, peer_pass, flops=True)


@dataclass(frozen=True)
class Entry:
    """A case by name. make: of a size. peer: what it is measured against. minutes: at base size on two cores."""

    work: str
    peer: str
    make: Callable[[Size], Case]
    minutes: float


HF, RELEASED = "transformers", "released scheme"
MODEL_CASES = {
    "pretrain_1": Entry("pre-training step MLM + ITM, 1 text per image", HF, lambda s: pretraining(s, 4, 1), 1.8),
    "pretrain_5": Entry("pre-training step MLM + ITM, 5 texts per image", HF, lambda s: pretraining(s, 2, 5), 3),
    "pretrain_official": Entry(
        "pre-training step MLM + ITM, 1 text per image, false images drawn",
        RELEASED,
        lambda s: pretraining_official(s, 4),
        1.8,
    ),
    "vqa_5": Entry("VQA step, 5 questions per image, 384 px", f"{HF}, VQA head on top", lambda s: vqa(s, 2, 5), 4),
    "irtr_16": Entry("16-way retrieval step with its ITM, 384 px", RELEASED, lambda s: irtr(s, 1), 3),
    "retrieval_all": Entry("retrieval of 4 images and 20 texts, all pairs", RELEASED, retrieval_all, 2),
    "retrieval_topk": Entry(
        "retrieval of 100 images and 500 texts, ITC's top 16 against all pairs", RELEASED, retrieval_topk, 1
    ),
    "inference_20": Entry("one image with 20 questions", HF, lambda s: inference(s, 20), 1),
    "contrastive_large": Entry(
        "contrastive fine-tuning with loading: large on a GPU, elsewhere a small model",
        HF,
        lambda s: contrastive(tiny=s.width < 100),
        0.5,
    ),
    "memory": Entry("peak memory of a pre-training step, 8 pairs, 1 text per image", HF, memory, 4),
}
CASES: dict[str, Entry] = MODEL_CASES | {
    name: Entry(work, "loading", make, 0.3) for name, (work, make) in DATA_CASES.items()
}
