"""Where dropout acts while training (released code: RoBERTa, and the cross-modal layers; nowhere else)."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bt.models.bridgetower import BridgeTower, Need
from bt.tasks.base import TaskModel
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM
from bt.tasks.vqa import VQA
from tests.models.towers import make_images, make_texts, make_tower
from tests.tasks.helpers import CONTEXT, make_batch

PAIRS = torch.tensor([[0, 0], [0, 1], [1, 2]])


class DropoutPlaces(TorchFunctionMode):
    """The modules inside which a dropout with a positive rate is applied, one entry a call."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.found: list[str] = []
        self.stack: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name))
            module.register_forward_hook(lambda *_: self.stack.pop() and None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            active = kwargs.get("training", args[2] if len(args) > 2 else True)
            if active and rate > 0:
                self.found.append(self.stack[-1])
        elif function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            self.found.append(self.stack[-1])
        elif function is F.multi_head_attention_forward:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            if given["dropout_p"] > 0 and given.get("training", True):
                self.found.append(self.stack[-1])
        return function(*args, **kwargs)


def places(tower: BridgeTower) -> list[str]:
    texts = make_texts(3)
    with DropoutPlaces(tower) as recorder:
        encoded = tower.encode_images(make_images(2)), tower.encode_texts(texts)
        tower.fuse(*encoded, PAIRS, Need(cls=True, text=True, image=True))
    return sorted(recorder.found)


def text_places(prefix: str = "") -> list[str]:
    """Of one pass of the text encoder: embeddings; attention probabilities, attention output, feed-forward output."""
    layers = [f"{prefix}text.model.encoder.layer.{i}" for i in range(3)]
    found = [f"{prefix}text.model.embeddings.dropout"]
    found += [f"{layer}.{place}" for layer in layers for place in ("attention.self", "attention.output.dropout")]
    return found + [f"{layer}.output.dropout" for layer in layers]


def cross_places(modality: str, layer: int, prefix: str = "") -> list[str]:
    """Of one cross-modal layer: probabilities of both attentions, and the output of each of the three sub-layers."""
    name = f"{prefix}cross.{modality}_layers.{layer}"
    parts = ("self_attention", "cross_attention", "ffn")
    return [f"{name}.{part}" for part in parts[:2]] + [f"{name}.{part}.dropout" for part in parts]


BOTH = [("text", 0), ("text", 1), ("image", 0), ("image", 1)]


def test_places_are_those_of_the_released_code():
    expected = text_places() + [place for layer in BOTH for place in cross_places(*layer)]
    found = places(make_tower(dropout=0.1).train())
    assert found == sorted(expected)
    assert len(found) == 1 + 3 * 3 + 4 * 5


@pytest.mark.parametrize("training", [True, False])
def test_places_of_all_objectives(training):
    """Heads have none. The text encoder runs once for the texts and the masked ones, the cross-modal encoder three
    times, of which MLM leaves out the last image layer; ITC adds nothing."""
    model = TaskModel(
        make_tower(dropout=0.1), {"mlm": MLM(CONTEXT), "itm": ITM(CONTEXT), "itc": ITC(CONTEXT), "vqa": VQA(CONTEXT)}
    ).train(training)
    texts = make_texts(3)
    positions = torch.zeros_like(texts.mask)
    positions[:, 1] = True
    targets = {
        "mlm": {"ids": texts.ids, "mask": texts.mask, "positions": positions, "labels": texts.ids[positions]},
        "itm": {"pairs": PAIRS, "labels": torch.tensor([1, 1, 0])},
        "itc": {"pair": torch.arange(3)},
        "vqa": {"scores": torch.zeros(3, 4), "answered": torch.ones(3, dtype=torch.bool)},
    }
    with DropoutPlaces(model) as recorder:
        model(make_batch(texts, PAIRS, targets))
    once = [place for layer in BOTH for place in cross_places(*layer, "tower.")]
    masked = [place for layer in BOTH[:3] for place in cross_places(*layer, "tower.")]
    expected = text_places("tower.") + 2 * once + masked
    # The first layer's self-attention runs once for images, and once for texts and for masked ones.
    for modality, again in (("image", 2), ("text", 1)):
        for place in cross_places(modality, 0, "tower.")[:3:2] * again:
            expected.remove(place)
    assert sorted(recorder.found) == (sorted(expected) if training else [])


def test_no_dropout_in_evaluation_and_at_rate_zero():
    assert places(make_tower(dropout=0.1).eval()) == []
    assert places(make_tower(dropout=0.0).train()) == []
