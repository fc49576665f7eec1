"""Where dropout acts while training (released code: RoBERTa, and the cross-modal layers; nowhere else)."""

import inspect

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bt.models.bridgetower import BridgeTower, Need
from tests.models.towers import make_images, make_texts, make_tower

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


def test_places_are_those_of_the_released_code():
    layers = [f"text.model.encoder.layer.{i}" for i in range(3)]
    expected = ["text.model.embeddings.dropout"]
    # Attention probabilities, attention output, feed-forward output.
    expected += [f"{layer}.{place}" for layer in layers for place in ("attention.self", "attention.output.dropout")]
    expected += [f"{layer}.output.dropout" for layer in layers]
    for layer in (f"cross.{m}_layers.{i}" for m in ("text", "image") for i in range(2)):
        # Probabilities of both attentions, and the output of each of the three sub-layers.
        expected += [f"{layer}.self_attention", f"{layer}.cross_attention"]
        expected += [f"{layer}.{part}.dropout" for part in ("self_attention", "cross_attention", "ffn")]
    found = places(make_tower(dropout=0.1).train())
    assert found == sorted(expected)
    assert len(found) == 1 + 3 * 3 + 4 * 5


def test_no_dropout_in_evaluation_and_at_rate_zero():
    assert places(make_tower(dropout=0.1).eval()) == []
    assert places(make_tower(dropout=0.0).train()) == []
