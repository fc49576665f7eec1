"""State dicts of the released ManagerTower code, to and from a TaskModel's.

Beside what bt.interop.official renames:
- a manager's norms are one list in the released code, the norm of the previous cross-modal output behind those of the
  managed layers; here that one is `own_norm`. Its scores are one tensor (1, N + 1, 1, D) for static managers, here
  `scores` (N, 1, D) and `own_weight` (D,); for adaptive ones (1, 1, 1, D), `own_weight`;
- the released layer embeddings have a row for every uni-modal layer, here for the managed ones, the last of them;
- the temperature of the cross-modal part (softmax_temperature_cross) is never used;
- the contrastive heads are called cross_modal_itc_*_head there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bt.errors import CheckpointError
from bt.interop.official import from_official, to_official, unused

_MANAGER = re.compile(r"cross_modal_(text|image)_manager_tower\.(\d+)\.manager_layer\.(.+)")
_OWN_MANAGER = re.compile(r"tower\.(text|image)_bridge\.managers\.(\d+)\.(.+)")
_EMBEDDINGS = re.compile(r"layer_embeddings_(text|image)\.weight")
_OWN_EMBEDDINGS = re.compile(r"tower\.(text|image)_bridge\.layer_embeddings\.weight")
_ITC_HEAD = re.compile(r"cross_modal_(itc_(?:text|image)_head\..+)")
_NAMES = {
    "linear_controller": "controller",
    "fusion_attention.q_proj": "q",
    "fusion_attention.k_proj": "k",
    "extra_query_LayerNorm": "other_norm",
}


def is_managertower(state: Mapping[str, Tensor]) -> bool:
    return any(_MANAGER.fullmatch(key) for key in state)


def managed_layers(state: Mapping[str, Tensor], modality: str) -> int:
    """How many uni-modal layers the released managers of a modality read."""
    start = f"cross_modal_{modality}_manager_tower.0.manager_layer.LayerNorm."
    return sum(1 for key in state if key.startswith(start) and key.endswith(".weight"))


def from_managertower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict -> the same tensors under own names. Raises CheckpointError for keys it does not know."""
    managed = {modality: managed_layers(state, modality) for modality in ("text", "image")}
    result: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := _MANAGER.fullmatch(key):
            modality, layer, name = match.groups()
            start = f"tower.{modality}_bridge.managers.{layer}"
            result |= {f"{start}.{own}": value for own, value in _own(name, tensor, managed[modality]).items()}
        elif match := _EMBEDDINGS.fullmatch(key):
            modality = match[1]
            result[f"tower.{modality}_bridge.layer_embeddings.weight"] = tensor[-managed[modality] :]
        elif match := _ITC_HEAD.fullmatch(key):
            rest[match[1]] = tensor
        else:
            rest[key] = tensor
    return result | from_official(rest)


def _own(name: str, tensor: Tensor, managed: int) -> dict[str, Tensor]:
    """The own name and value, without the manager's prefix, of a released tensor of a manager."""
    if name == "softmax_temperature":
        return {"temperature": tensor.reshape(())}
    if name == "softmax_temperature_cross":
        return {}
    if name == "layer_scores":
        scores = tensor[0, :managed]
        return {"scores": scores} | ({"own_weight": tensor[0, managed, 0]} if tensor.shape[1] > managed else {})
    if name == "layer_scores_cross":
        return {"own_weight": tensor[0, 0, 0]}
    if match := re.fullmatch(r"LayerNorm\.(\d+)\.(weight|bias)", name):
        number = int(match[1])
        return {f"norms.{number}.{match[2]}" if number < managed else f"own_norm.{match[2]}": tensor}
    part, _, kind = name.rpartition(".")
    if part not in _NAMES:
        raise CheckpointError(f"released keys that have no counterpart here: manager_layer.{name}")
    return {f"{_NAMES[part]}.{kind}": tensor}


def unused_managertower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model never uses, by released names; of the layer embeddings the rows below the managed layers."""
    found = unused(state)
    for key, tensor in state.items():
        if match := _EMBEDDINGS.fullmatch(key):
            found[key] = tensor[: len(tensor) - managed_layers(state, match[1])]
        elif key.endswith(".softmax_temperature_cross"):
            found[key] = tensor
    return found


def to_managertower(
    state: Mapping[str, Tensor], depth: Mapping[str, int], lower: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The inverse of `from_managertower`, without the tensors that are never used.

    depth: uni-modal layers of each modality, as many rows as the released layer embeddings have; those of layers that
    are not managed are 0, or what `lower` has under their released name.
    """
    managed = {
        match[1]: len(tensor) for key, tensor in state.items() if (match := _OWN_EMBEDDINGS.fullmatch(key)) is not None
    }
    result: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := _OWN_MANAGER.fullmatch(key):
            modality, layer, name = match.groups()
            start, own = f"cross_modal_{modality}_manager_tower.{layer}.manager_layer", f"tower.{modality}_bridge."
            manager = {
                other.removeprefix(f"{own}managers.{layer}."): value
                for other, value in state.items()
                if other.startswith(f"{own}managers.{layer}.")
            }
            found = _released(name, manager, managed[modality])
            if found is not None:
                result[f"{start}.{found[0]}"] = found[1]
        elif match := _OWN_EMBEDDINGS.fullmatch(key):
            name, missing = f"layer_embeddings_{match[1]}.weight", depth[match[1]] - len(tensor)
            rows = (lower or {}).get(name, tensor.new_zeros(missing, tensor.shape[1]))
            result[name] = torch.cat([rows, tensor])
        else:
            rest[key] = tensor
    released = to_official(rest)
    return result | {f"cross_modal_{key}" if key.startswith("itc_") else key: value for key, value in released.items()}


def _released(name: str, manager: Mapping[str, Tensor], managed: int) -> tuple[str, Tensor] | None:
    """The released name and value of an own tensor of a manager; None where another tensor holds it too."""
    tensor = manager[name]
    if name == "temperature":
        return "softmax_temperature", tensor.reshape(1)
    if name == "scores":
        parts = [tensor] + ([manager["own_weight"][None, None]] if "own_weight" in manager else [])
        return "layer_scores", torch.cat(parts)[None]
    if name == "own_weight":
        return None if "scores" in manager else ("layer_scores_cross", tensor[None, None, None])
    part, _, kind = name.rpartition(".")
    if part.startswith("norms."):
        return f"LayerNorm.{part.removeprefix('norms.')}.{kind}", tensor
    if part == "own_norm":
        return f"LayerNorm.{managed}.{kind}", tensor
    names = {own: released for released, own in _NAMES.items()}
    return f"{names[part]}.{kind}", tensor
