"""Models and batches of the benchmark: `bt` and transformers' classes with the same random weights and inputs.

Dropout is 0 everywhere, so that losses and gradients can be compared before anything is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)

from bt.data.batch import Batch, Texts
from bt.interop.huggingface import from_huggingface
from bt.models.bridgetower import build_tower
from bt.tasks.base import Context, Objective, TaskModel
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM

NORM_EPS = 1e-5  # transformers' cross-modal layers and MLM head take RoBERTa's
MASK_ID = 4


@dataclass(frozen=True)
class Size:
    """Of all three encoders. answers: of VQA. finetuned: image size of fine-tuning. max_tokens: to which the released
    recipes pad."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    cross_layers: int = 6
    patch: int = 16
    vocabulary: int = 50265
    image: int = 288
    finetuned: int = 384
    answers: int = 3129
    max_tokens: int = 50

    @property
    def for_finetuning(self) -> Size:
        return replace(self, image=self.finetuned)


TINY = {"depth": 3, "cross_layers": 2, "vocabulary": 200, "image": 64, "finetuned": 96, "answers": 20, "max_tokens": 24}
# base: the paper's; tiny: for the benchmark's own test.
SIZES = {"base": Size(), "tiny": Size(width=64, heads=2, **TINY)}


def text_config(size: Size, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": NORM_EPS,
        "pad_token_id": 1,
    }


def peer_config(size: Size, **options: Any) -> BridgeTowerConfig:
    common = {"hidden_size": size.width, "initializer_factor": 0.4}  # from N(0, 0.05 * factor); 0.02 is the paper's
    vision = {**common, "num_hidden_layers": size.depth, "image_size": size.image, "patch_size": size.patch}
    return BridgeTowerConfig(
        **common,
        num_hidden_layers=size.cross_layers,
        num_attention_heads=size.heads,
        text_config={**text_config(size), "initializer_factor": 0.4},
        vision_config=vision,
        **options,
    )


def make_peer(size: Size) -> nn.ModuleDict:
    """Both classes of transformers on one trunk."""
    config = peer_config(size)
    mlm, itm = BridgeTowerForMaskedLM(config), BridgeTowerForImageAndTextRetrieval(config)
    itm.bridgetower = mlm.bridgetower
    return nn.ModuleDict({"mlm": mlm, "itm": itm}).train()


class PeerVQA(nn.Module):
    """transformers' trunk with the paper's VQA head on top."""

    def __init__(self, size: Size):
        super().__init__()
        self.trunk = BridgeTowerModel(peer_config(size))
        width = 2 * size.width
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, size.answers)
        )

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.trunk(**inputs).pooler_output)


def pretraining_objectives(context: Context) -> dict[str, Objective]:
    return {"mlm": MLM(context, norm_eps=NORM_EPS), "itm": ITM(context)}


def make_model(size: Size, objectives: Callable[[Context], Mapping[str, Objective]], dropout: float = 0.0) -> TaskModel:
    """`bt`, with random weights. dropout: of hidden states in the text encoder, of all in the cross-modal layers."""
    architecture = {"width": size.width, "layers": size.depth, "patch_size": size.patch, "quick_gelu": True}
    encoders = "bt.models.encoders"
    vision = {
        "_target_": f"{encoders}.open_clip_vit.OpenClipVision",
        "image_size": size.image,
        "architecture": architecture,
    }
    cross = {"width": size.width, "heads": size.heads, "layers": size.cross_layers, "dropout": dropout}
    tower = build_tower(
        {
            "vision": vision,
            "text": {
                "_target_": f"{encoders}.hf_text.HFText",
                "config": {"model_type": "roberta", **text_config(size, dropout)},
            },
        },
        {"_target_": "bt.models.bridges.add.AddBridge", "norm_eps": NORM_EPS},
        {"_target_": "bt.models.cross_modal.CoAttention", "norm_eps": NORM_EPS, **cross},
        vocab_size=size.vocabulary,
    )
    tokenizer = SimpleNamespace(vocab_size=size.vocabulary, mask_id=MASK_ID, special_ids=[0, 1, 2])
    labels = {"answers": [str(number) for number in range(size.answers)]}
    context = Context(tower.width, tower.text.width, tower.vision.width, tokenizer, labels)
    return TaskModel(tower, objectives(context)).train()


def make_ours(size: Size, peer: nn.ModuleDict) -> TaskModel:
    """`bt` with the weights of make_peer."""
    model = make_model(size, pretraining_objectives)
    model.load_state_dict(from_huggingface({**peer["mlm"].state_dict(), **peer["itm"].state_dict()}))
    return model


def make_vqa(size: Size, peer: PeerVQA, objectives: Callable[[Context], Mapping[str, Objective]]) -> TaskModel:
    """`bt` with the weights of PeerVQA."""
    model = make_model(size, objectives)
    trunk = {f"bridgetower.{name}": tensor for name, tensor in peer.trunk.state_dict().items()}
    head = {f"objectives.vqa.head.{name}": tensor for name, tensor in peer.head.state_dict().items()}
    model.load_state_dict({**from_huggingface(trunk), **head})
    return model


def make_batch(
    size: Size, images: int, texts_per_image: int, tokens: tuple[int, int] = (12, 18), false_images: bool = False
) -> Batch:
    """Random images and captions of 12 to 18 tokens, or as `tokens` says; a seventh of the tokens masked, half of the
    pairs mismatched. false_images: mismatched pairs have an image of their own, as
    the released recipe draws it, not another one of the batch.
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
    others = images + torch.arange(pairs) // 2 if false_images else (image_rows + 1) % images
    mixed = torch.where(match, image_rows, others)
    count = images + (pairs // 2 if false_images else 0)
    return Batch(
        images=torch.randn(count, 3, size.image, size.image, generator=draw),
        texts=Texts(ids, mask),
        pairs=torch.stack([image_rows, text_rows], 1),
        image_ids=torch.arange(count),
        pair_ids=text_rows,
        targets={
            "mlm": {
                "ids": ids.masked_fill(positions, MASK_ID),
                "mask": mask,
                "positions": positions,
                "labels": ids[positions],
            },
            "itm": {"pairs": torch.stack([mixed, text_rows], 1), "labels": match.long()},
        },
    )


class Step:
    """A training step: losses (a callable), gradients, AdamW; returns the losses and the gradient's norm.

    The learning rate is 0: AdamW does all of its work, and the weights stay as they are, so that both sides can be
    compared at any time. `prepare` and `release`, which are not timed, make and free AdamW's moments, so that the
    memory of two models with optimizers is never needed at once. set_up: called before, when sides share a model.
    around: a context of forward and backward pass.
    """

    def __init__(self, model: nn.Module, losses: Callable[[], list[Tensor]], set_up: Callable[[], None] = lambda: None):
        self.model, self.losses, self.set_up = model, losses, set_up
        self.around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def prepare(self) -> None:
        self.set_up()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        self.optimizer.state.clear()

    def __call__(self) -> Tensor:
        with self.around():
            losses = self.losses()
            sum(losses).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([*(loss.detach() for loss in losses), norm])


def make_step(model: TaskModel, batch: Batch, set_up: Callable[[], None] = lambda: None) -> Step:
    """A training step of `bt`."""
    counts = model.counts(batch).tolist()
    return Step(model, lambda: [r.loss / c for r, c in zip(model(batch).values(), counts, strict=True)], set_up)
