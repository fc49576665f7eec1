"""The scheme of the released code, as switches on `bt`'s own code, so that each saving is seen alone.

Released: two full passes a step (one for each objective, each with its own pass of both encoders), texts padded to the
longest allowed, the MLM head on all positions, every cross-modal layer on all tokens, images expanded to pairs before
the first of them, attention and activations by their formulas (bt_module.py, infer; objectives.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bt.bench.models import Step
from bt.data.batch import Batch, Texts
from bt.models.bridgetower import BridgeTower, Encoded, Fused, Need
from bt.models.cross_modal import set_folding
from bt.models.gather import gather
from bt.models.quick_gelu import use_formula
from bt.tasks.base import Objective, Result, Shared, TaskModel
from bt.tasks.mlm import MLM


@dataclass(frozen=True)
class Scheme:
    """What is done as in the released code; nothing: `bt`. In the order in which the savings are listed."""

    apart: bool = False  # both encoders once for each objective
    padded: bool = False  # texts to the longest allowed
    every_position: bool = False  # the MLM head on all positions
    whole_layers: bool = False  # the last cross-modal layer on all tokens
    expanded: bool = False  # states to pairs before the first cross-modal layer
    projected: bool = False  # all queries, keys and values projected before they are multiplied
    formulas: bool = False  # attention matrices in memory, activations step by step


OFFICIAL = Scheme(**{field.name: True for field in fields(Scheme)})


def savings() -> list[tuple[str, Scheme]]:
    """The released scheme, and one saving after the other on top, down to `bt`: (what is new, scheme)."""
    steps, scheme = [("released scheme", OFFICIAL)], OFFICIAL
    for field in fields(Scheme):
        scheme = replace(scheme, **{field.name: False})
        steps.append((field.name, scheme))
    return steps


def prepare(model: nn.Module, scheme: Scheme) -> None:
    """Sets what modules of the model do by themselves."""
    set_folding(model, not scheme.projected)
    use_formula(model, scheme.formulas)


def kernels(scheme: Scheme) -> contextlib.AbstractContextManager:
    return sdpa_kernel(SDPBackend.MATH) if scheme.formulas else contextlib.nullcontext()


class SchemeTower:
    """A tower's three calls by a scheme. With `apart` the first two do nothing, and `fuse` encodes."""

    def __init__(self, tower: BridgeTower, scheme: Scheme, max_tokens: int):
        self.tower, self.scheme, self.max_tokens = tower, scheme, max_tokens
        self.vision = tower.vision

    def encode_images(self, images: Tensor) -> Encoded | Tensor:
        return images if self.scheme.apart else self.tower.encode_images(images)

    def encode_texts(self, texts: Texts) -> Encoded | Texts:
        return texts if self.scheme.apart else self.encoded(texts)

    def encoded(self, texts: Texts) -> Encoded:
        more = self.max_tokens - texts.ids.shape[1] if self.scheme.padded else 0
        pad_id = self.tower.text.pad_id
        return self.tower.encode_texts(Texts(F.pad(texts.ids, (0, more), value=pad_id), F.pad(texts.mask, (0, more))))

    def fuse(self, images: Encoded | Tensor, texts: Encoded | Texts, pairs: Tensor, need: Need) -> Fused:
        """As BridgeTower.fuse."""
        image_rows, text_rows = pairs.unbind(1)
        if self.scheme.apart:
            used, image_rows = image_rows.unique(return_inverse=True)
            images = self.tower.encode_images(images[used])
            used, text_rows = text_rows.unique(return_inverse=True)
            texts = self.encoded(Texts(texts.ids[used], texts.mask[used]))
        if self.scheme.expanded:
            images, texts = expanded(images, image_rows), expanded(texts, text_rows)
            image_rows = text_rows = torch.arange(len(pairs))
        pairs = torch.stack([image_rows, text_rows], 1)
        if isinstance(need.text, Tensor):
            need = replace(need, text=F.pad(need.text, (0, texts.mask.shape[1] - need.text.shape[1])))
        if not self.scheme.whole_layers:
            return self.tower.fuse(images, texts, pairs, need)
        # MLM reads no image, nor does the released code's last image layer get a gradient from it; it runs.
        whole = self.tower.fuse(images, texts, pairs, Need(cls=need.cls, text=True, image=True))
        text = whole.text[need.text] if isinstance(need.text, Tensor) else whole.text
        return Fused(whole.cls, text, whole.image)


def expanded(encoded: Encoded, rows: Tensor) -> Encoded:
    """One row for each pair."""
    mask = None if encoded.mask is None else gather(encoded.mask, rows)
    return Encoded([gather(state, rows) for state in encoded.states], gather(encoded.cls, rows), mask)


def mlm_everywhere(mlm: MLM, shared: Shared, targets: dict[str, Tensor]) -> Result:
    """MLM.forward with the head on all positions."""
    texts = shared.own_texts(mlm)
    image_rows = shared.batch.pairs[:, 0]
    pairs = torch.stack([image_rows, torch.arange(len(image_rows))], 1)
    states = shared.tower.fuse(shared.images, texts, pairs, Need(text=True)).text
    labels = torch.full_like(targets["ids"], -100).masked_scatter(targets["positions"], targets["labels"])
    labels = F.pad(labels, (0, states.shape[1] - labels.shape[1]), value=-100)
    return Result(F.cross_entropy(mlm.head(states).flatten(0, 1), labels.flatten(), reduction="sum"))


def results(model: TaskModel, batch: Batch, scheme: Scheme, max_tokens: int) -> list[Result]:
    """What model(batch) gives, by a scheme for which the model is prepared."""
    tower = SchemeTower(model.tower, scheme, max_tokens)
    shared, found = Shared(tower, batch, model.objectives), []
    for name, objective in model.objectives.items():
        if scheme.apart:
            shared = Shared(tower, batch, {name: objective})
        if scheme.every_position and isinstance(objective, MLM):
            found.append(mlm_everywhere(objective, shared, batch.targets[name]))
        else:
            found.append(shared.result(name))
    return found


def make_scheme_step(model: TaskModel, batch: Batch, scheme: Scheme, max_tokens: int) -> Step:
    """A training step by a scheme; its `prepare` sets the model's modules, which steps of other schemes may share."""
    counts = model.counts(batch).tolist()

    def losses() -> list[Tensor]:
        found = results(model, batch, scheme, max_tokens)
        return [result.loss / count for result, count in zip(found, counts, strict=True)]

    step = Step(model, losses, lambda: prepare(model, scheme))
    step.around = lambda: kernels(scheme)
    return step


@torch.no_grad()
def encode_officially(model: TaskModel, batch: Batch, max_tokens: int) -> tuple[SchemeTower, Encoded, Encoded]:
    """Released retrieval evaluation (compute_irtr_recall): every image and text is encoded once."""
    scheme = replace(OFFICIAL, apart=False)
    prepare(model, scheme)
    tower = SchemeTower(model.tower, scheme, max_tokens)
    with kernels(scheme):
        return tower, tower.encode_images(batch.images), tower.encode_texts(batch.texts)


@torch.no_grad()
def fuse_officially(encoded: tuple[SchemeTower, Encoded, Encoded], ranker: Objective, texts: list[Tensor]) -> Tensor:
    """Then image by image with chunks of texts. texts: for each image rows of texts; returns all scores in a row."""
    tower, of_images, of_texts = encoded
    found = []
    with kernels(tower.scheme):
        for image, rows in enumerate(texts):
            pairs = torch.stack([torch.full_like(rows, image), rows], 1)
            found.append(ranker.score(tower.fuse(of_images, of_texts, pairs, Need(cls=True)).cls))
    return torch.cat(found)
