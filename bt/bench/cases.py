"""The same work on `bt` and on transformers' BridgeTower classes, with the same random weights and inputs.

transformers' classes are run as their users run them: one image per text, one forward pass of a class per objective.
Dropout is 0 on both sides, so that losses and gradients can be compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
)

from bt.bench.case import Case
from bt.bench.data_cases import DATA_CASES
from bt.data.batch import Batch, Texts
from bt.interop.huggingface import from_huggingface
from bt.models.bridgetower import Need, build_tower
from bt.tasks.base import Context, TaskModel
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM

NORM_EPS = 1e-5  # transformers' cross-modal layers and MLM head take RoBERTa's


@dataclass(frozen=True)
class Size:
    """Of all three encoders. base: the paper's; tiny: for the benchmark's own test."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    cross_layers: int = 6
    vocabulary: int = 50265
    image: int = 288


SIZES = {"base": Size(), "tiny": Size(width=64, depth=3, heads=2, cross_layers=2, vocabulary=200, image=64)}


def make_peer(size: Size) -> nn.ModuleDict:
    """Both classes of transformers on one trunk."""
    common = {
        "hidden_size": size.width,
        "num_hidden_layers": size.cross_layers,
        "num_attention_heads": size.heads,
        "initializer_factor": 0.4,  # the port draws from N(0, 0.05 * factor); 0.02 is the paper's
    }
    text = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": NORM_EPS,
        "initializer_factor": 0.4,
    }
    vision = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "image_size": size.image,
        "patch_size": 16,
        "initializer_factor": 0.4,
    }
    config = BridgeTowerConfig(**common, text_config=text, vision_config=vision)
    mlm, itm = BridgeTowerForMaskedLM(config), BridgeTowerForImageAndTextRetrieval(config)
    itm.bridgetower = mlm.bridgetower
    return nn.ModuleDict({"mlm": mlm, "itm": itm}).train()


def make_ours(size: Size, peer: nn.ModuleDict) -> TaskModel:
    """The same model with the peer's weights."""
    text = {**peer["mlm"].config.text_config.to_dict(), "model_type": "roberta"}
    text.pop("architectures", None)
    architecture = {"width": size.width, "layers": size.depth, "patch_size": 16, "quick_gelu": True}
    encoders = "bt.models.encoders"
    tower = build_tower(
        {
            "vision": {
                "_target_": f"{encoders}.open_clip_vit.OpenClipVision",
                "image_size": size.image,
                "architecture": architecture,
            },
            "text": {"_target_": f"{encoders}.hf_text.HFText", "config": text},
        },
        {"_target_": "bt.models.bridges.add.AddBridge", "norm_eps": NORM_EPS},
        {
            "_target_": "bt.models.cross_modal.CoAttention",
            "width": size.width,
            "heads": size.heads,
            "layers": size.cross_layers,
            "dropout": 0.0,
            "norm_eps": NORM_EPS,
        },
        vocab_size=size.vocabulary,
    )
    tokenizer = SimpleNamespace(vocab_size=size.vocabulary, mask_id=4, special_ids=[0, 1, 2])
    context = Context(tower.width, tower.text.width, tower.vision.width, tokenizer)
    model = TaskModel(tower, {"mlm": MLM(context, norm_eps=NORM_EPS), "itm": ITM(context)})
    model.load_state_dict(from_huggingface({**peer["mlm"].state_dict(), **peer["itm"].state_dict()}))
    return model.train()


def make_batch(size: Any, images: int, texts_per_image: int, tokens: tuple[int, int] = (12, 18)) -> Batch:
    """Random images and captions of 12 to 18 tokens, or as `tokens` says; a seventh of the tokens masked, half of the
    pairs mismatched. size: has `image` and `vocabulary`.
    """
    draw = torch.Generator().manual_seed(0)
    pairs = images * texts_per_image
    lengths = torch.randint(tokens[0], tokens[1] + 1, (pairs,), generator=draw)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.randint(5, size.vocabulary, mask.shape, generator=draw).masked_fill(~mask, 1)
    ids[:, 0] = 0
    positions = mask & (torch.arange(mask.shape[1])[None] % 7 == 3)
    image_rows = torch.arange(images).repeat_interleave(texts_per_image)
    text_rows = torch.arange(pairs)
    match = torch.arange(pairs) % 2 == 0
    mixed = torch.where(match, image_rows, (image_rows + 1) % images)
    return Batch(
        images=torch.randn(images, 3, size.image, size.image, generator=draw),
        texts=Texts(ids, mask),
        pairs=torch.stack([image_rows, text_rows], 1),
        image_ids=torch.arange(images),
        pair_ids=text_rows,
        targets={
            "mlm": {
                "ids": ids.masked_fill(positions, 4),
                "mask": mask,
                "positions": positions,
                "labels": ids[positions],
            },
            "itm": {"pairs": torch.stack([mixed, text_rows], 1), "labels": match.long()},
        },
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def finish_step(losses: list[Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Backward and AdamW; the losses and the norm of the gradient."""
    sum(losses).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([*(loss.detach() for loss in losses), norm])


def pretraining(size: Size, images: int, texts_per_image: int) -> Case:
    """One step of MLM + ITM with negatives from the batch, and AdamW."""
    peer = make_peer(size)
    ours = make_ours(size, peer)
    batch = make_batch(size, images, texts_per_image)
    counts = ours.counts(batch).tolist()
    our_optimizer, peer_optimizer = optimizer_of(ours), optimizer_of(peer)

    def our_step() -> Tensor:
        results = ours(batch)
        losses = [result.loss / count for result, count in zip(results.values(), counts, strict=True)]
        return finish_step(losses, ours, our_optimizer)

    mlm, itm, texts = batch.targets["mlm"], batch.targets["itm"], batch.texts
    labels = torch.full_like(texts.ids, -100).masked_scatter(mlm["positions"], mlm["labels"])

    def peer_step() -> Tensor:
        mask = texts.mask.long()
        matching = {"pixel_values": batch.images[batch.pairs[:, 0]], "input_ids": mlm["ids"], "attention_mask": mask}
        mixed = {"pixel_values": batch.images[itm["pairs"][:, 0]], "input_ids": texts.ids, "attention_mask": mask}
        losses = [peer["mlm"](**matching, labels=labels).loss, peer["itm"](**mixed, labels=itm["labels"]).loss]
        return finish_step(losses, peer, peer_optimizer)

    return Case(images * texts_per_image, our_step, peer_step)


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

    return Case(questions, our_pass, peer_pass)


CASES: dict[str, tuple[str, Callable[[Size], Any]]] = {
    "pretrain_1": ("pre-training step MLM + ITM, 1 text per image", lambda size: pretraining(size, 4, 1)),
    "pretrain_5": ("pre-training step MLM + ITM, 5 texts per image", lambda size: pretraining(size, 2, 5)),
    "inference_20": ("one image with 20 questions", lambda size: inference(size, 20)),
    **DATA_CASES,
}
