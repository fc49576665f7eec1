"""The golden fixtures (tests/golden/README.md): models, weights, batches, and comparison as their README describes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bt.data.batch import Texts
from bt.interop.managertower import from_managertower, is_managertower, to_managertower
from bt.interop.official import from_official, to_official
from bt.models.bridges.add import AddBridge
from bt.models.bridges.base import Bridge
from bt.models.bridges.manager import ManagerBridge
from bt.models.bridges.meter_fusion import MeterFusionBridge
from bt.models.bridges.none import NoBridge
from bt.models.bridgetower import BridgeTower
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision

GOLDEN = Path(__file__).parent / "golden"
PROJECTION_FREQUENCIES = (0.1, 0.73, 1.9, 2.71)
VOCABULARY, WIDTH, CROSS_LAYERS, CONTRASTIVE, ANSWERS = 120, 128, 3, 64, 10


def tensors(case: str) -> dict[str, Tensor]:
    """A safetensors file by its path below tests/golden, without suffix; fp16 values as fp32."""
    state = load_file(GOLDEN / f"{case}.safetensors")
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def table(case: str) -> dict:
    """A JSON file by its path below tests/golden, without suffix."""
    return json.loads((GOLDEN / f"{case}.json").read_text())


def golden_batch(case: str = "bridgetower/batch") -> dict[str, Tensor]:
    return tensors(case)


def golden_texts(batch: dict[str, Tensor], ids: str = "text_ids", masks: str = "text_masks") -> Texts:
    return Texts(batch[ids], batch[masks].bool())


FOLDERS = {
    "add": "bridgetower",
    "none": "meter",
    "fusion": "meter_fusion",
    "static": "managertower_saue",
    "adaptive": "managertower_aaue",
}


def golden_bridge(bridge: str, depth: int) -> Bridge:
    if bridge == "fusion":
        return MeterFusionBridge(WIDTH, CROSS_LAYERS, uni_width=WIDTH, depth=depth)
    if bridge in ("static", "adaptive"):
        # The released managers attend to padding too.
        return ManagerBridge(WIDTH, CROSS_LAYERS, kind=bridge, managed=2, noise=False, attend_padding=True)
    return {"add": AddBridge, "none": NoBridge}[bridge](WIDTH, CROSS_LAYERS)


def golden_tower(bridge: str = "add", image_size: int = 64) -> BridgeTower:
    """The fixtures' tower with random weights: a bridge of FOLDERS (METER has one image block less)."""
    vision = OpenClipVision(
        image_size=image_size,
        remove_last_layers=1 if bridge in ("none", "fusion") else 0,
        architecture={"width": WIDTH, "layers": 4, "patch_size": 16, "head_width": 64, "quick_gelu": True},
    )
    text = HFText(config={"model_type": "roberta", **table("bridgetower/config")["text_encoder"]})
    cross = CoAttention(width=WIDTH, heads=4, layers=CROSS_LAYERS, dropout=0.0)
    return BridgeTower(vision, text, golden_bridge(bridge, text.depth), golden_bridge(bridge, vision.depth), cross)


def golden_state(bridge: str = "add") -> dict[str, Tensor]:
    """The fixtures' weights under own names (`tower.*`, `objectives.*`)."""
    state = tensors("bridgetower/weights")
    if bridge != "add":
        own = tensors(f"{FOLDERS[bridge]}/weights")
        keys = table(f"{FOLDERS[bridge]}/keys")
        state = {key: own[key] if entry["from"] == "own" else state.get(key) for key, entry in keys.items()}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    return from_managertower(state) if is_managertower(state) else from_official(state)


def to_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own names to those of the fixtures."""
    managed = any(".layer_embeddings." in key for key in state)
    return to_managertower(state, {"text": 4, "image": 4}) if managed else to_official(state)


def load_golden(model: nn.Module, bridge: str = "add") -> nn.Module:
    """Loads the fixtures' weights into a TaskModel (or anything with `tower.*` and `objectives.*`); every tensor of
    the model must be there."""
    state = golden_state(bridge)
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    assert not missing, missing
    model.load_state_dict({key: state[key] for key in wanted})
    return model


@dataclass
class GradientError:
    """Largest error over all parameters: relative to the parameter's own norm and absmax, and of the key biases
    relative to the norm of all gradients together.

    numbers: that of parameters of one number (the managers' temperatures): sums that nearly cancel, so that rounding,
    which differs between processors, is large beside them. The fixtures' own, in double precision, is 3.5e-5.
    """

    projections: float = 0.0
    entries: float = 0.0
    numbers: float = 0.0
    key_biases: float = 0.0
    compared: int = 0


def key_bias_free(name: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient without its key-bias part, the key-bias part), both flat; the latter may be empty."""
    flat = gradient.reshape(-1)
    if name.endswith(".key.bias"):
        return flat[:0], flat
    if name.endswith("in_proj_bias"):
        query, key, value = flat.chunk(3)
        return torch.cat([query, value]), key
    return flat, flat[:0]


def compare_gradients(model: nn.Module, case: str, entries: bool = True) -> GradientError:
    """Compares the gradients of every parameter with the case's grads.json (and grads.safetensors, if `entries`).

    Asserts that exactly the recorded parameters have a gradient. A zero gradient of a parameter that the case
    records as unreached counts as different.
    """
    recorded = table(f"{case}/grads")
    stored = tensors(f"{case}/grads") if entries else {}
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: gradient.detach().float() for name, gradient in to_released(own).items()}
    reached = {name for name, entry in recorded.items() if entry is not None}
    assert found.keys() == reached, sorted(found.keys() ^ reached)[:5]
    total = sum(recorded[name]["norm"] ** 2 for name in reached) ** 0.5
    error = GradientError()
    for name in sorted(reached):
        entry, gradient = recorded[name], found[name]
        assert list(gradient.shape) == entry["shape"], name
        free, key_bias = key_bias_free(name, gradient)
        if len(key_bias):
            error.key_biases = max(error.key_biases, key_bias.abs().max().item() / total)
        if not len(free) or entry["norm"] <= 1e-6 * total:
            continue
        error.compared += 1
        flat = gradient.reshape(-1)
        if flat.numel() == 1:
            error.numbers = max(error.numbers, abs(flat.item() - entry["sum"]) / entry["norm"])
            continue
        double, index = flat.double(), torch.arange(1, flat.numel() + 1, dtype=torch.float64)
        projections = [(double * torch.cos(index * f)).sum().item() for f in PROJECTION_FREQUENCIES]
        pairs = zip([*projections, double.norm().item()], [*entry["proj"], entry["norm"]], strict=True)
        error.projections = max(error.projections, *(abs(a - b) / entry["norm"] for a, b in pairs))
        if name in stored:
            sample = flat if flat.numel() <= 1024 else flat[(torch.arange(256) * 7919 + 13) % flat.numel()]
            worst = (sample - stored[name].reshape(-1)).abs().max().item()
            error.entries = max(error.entries, worst / entry["absmax"])
    return error


def assert_gradients(model: nn.Module, case: str, entries: bool = True, least: int = 200) -> GradientError:
    """The tolerances of the README: 2e-5 of the parameter's own norm and absmax (single numbers 2e-4); key biases 1e-6
    of the total.

    least: so many parameters at least must have been compared.
    """
    error = compare_gradients(model, case, entries)
    assert error.compared >= least, error
    assert error.projections <= 2e-5, error
    assert error.entries <= 2e-5, error
    assert error.numbers <= 2e-4, error
    assert error.key_biases <= 1e-6, error
    return error


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; the shapes must agree."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()
