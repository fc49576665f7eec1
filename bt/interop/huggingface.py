"""State dicts of transformers' BridgeTower classes, to and from a TaskModel's, by way of the released names.

transformers renames little of the released model: the prefix `bridgetower.` (task classes; the bare BridgeTowerModel
has none), `text_model`, `vision_model` and the three tensors of the image embedding. Differences of substance:
- the temperature is stored as logit_scale = -ln(temperature);
- ForContrastiveLearning has a third head, on the fused [CLS] (`itc_cross_modal_head`), and its image head reads the
  projected image [CLS], where the released one reads it before the projection: where the third head is there, all three
  and the scale are those of bt.tasks.contrastive, not of ITC;
- the epsilon of the cross-modal norms and of the MLM head's is 1e-5 (text_config.layer_norm_eps), of the released
  code 1e-12: set `cross.norm_eps` and `task.objectives.mlm.norm_eps` to what the weights were trained with;
- the learned number of a link tower (`scaled_factor`, `beta`), one tensor for each layer, is one tensor for a bridge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bt.errors import CheckpointError
from bt.interop.official import from_official, to_official, unused

# transformers' name without the prefix "bridgetower.", released name.
IMAGE_EMBEDDING = {
    "vision_model.visual.embeddings.class_embedding": "vit_model.visual.class_embedding",
    "vision_model.visual.embeddings.patch_embedding.weight": "vit_model.visual.conv1.weight",
    "vision_model.visual.embeddings.position_embedding.weight": "vit_model.visual.positional_embedding",
}
PREFIXES = {"vision_model.visual.": "vit_model.visual.", "text_model.": "text_transformer."}
# transformers' link towers with a learned number for each layer: its name there, the bridges' own.
LINK_SCALES = {"scaled_factor": "scale", "beta": "share"}
_LINK_SCALE = re.compile(r"(?:bridgetower\.)?cross_modal_(text|image)_link_tower\.(\d+)\.(scaled_factor|beta)")
_OWN_SCALE = re.compile(r"tower\.(text|image)_bridge\.(scale|share)")
# transformers' head, own head.
CONTRASTIVE = {
    f"itc_{head}_head.fc.{part}": f"objectives.contrastive.{own}_head.fc.{part}"
    for head, own in (("text", "text"), ("image", "image"), ("cross_modal", "cross"))
    for part in ("weight", "bias")
} | {"logit_scale": "objectives.contrastive.logit_scale"}
# Keys of the task classes that stand beside `bridgetower.`, not below it.
HEAD = re.compile(r"(mlm_score|itm_score|itc_text_head|itc_image_head)\..+")


def released_name(key: str) -> str:
    """transformers' name -> the released one; those that transformers did not change stay as they are."""
    key = key.removeprefix("bridgetower.")
    if key in IMAGE_EMBEDDING:
        return IMAGE_EMBEDDING[key]
    for own, released in PREFIXES.items():
        if key.startswith(own):
            return released + key.removeprefix(own)
    return key


def transformers_name(key: str) -> str:
    """The inverse of `released_name`, without the prefix of the task classes."""
    for own, released in IMAGE_EMBEDDING.items():
        if key == released:
            return own
    for own, released in PREFIXES.items():
        if key.startswith(released):
            return own + key.removeprefix(released)
    return key


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of BridgeTowerModel, ForMaskedLM, ForImageAndTextRetrieval or ForContrastiveLearning -> own names.

    Raises CheckpointError for keys it does not know.
    """
    contrastive = {}
    if any(key.startswith("itc_cross_modal_head.") for key in state):
        contrastive = {CONTRASTIVE[key]: tensor for key, tensor in state.items() if key in CONTRASTIVE}
        state = {key: tensor for key, tensor in state.items() if key not in CONTRASTIVE}
    released = {}
    scales: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        if match := _LINK_SCALE.fullmatch(key):
            own = f"tower.{match[1]}_bridge.{LINK_SCALES[match[3]]}"
            scales.setdefault(own, {})[int(match[2])] = tensor
        elif key == "logit_scale":
            released["temperature"] = torch.exp(-tensor)
        else:
            released[released_name(key)] = tensor
    stacked = {own: torch.stack([found[layer] for layer in sorted(found)]) for own, found in scales.items()}
    return from_official(released) | stacked | contrastive


def unused_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model never uses, under the released names."""
    return unused({released_name(key): tensor for key, tensor in state.items()})


def to_huggingface(state: Mapping[str, Tensor], bare: bool = False) -> dict[str, Tensor]:
    """The inverse: own names -> those of transformers' task classes, or of BridgeTowerModel (`bare`; without heads).

    Heads that transformers has no class for (VQA, SNLI-VE, NLVR2, ranking) are left out, as is what it never uses.
    """
    contrastive = {key: state[own] for key, own in CONTRASTIVE.items() if own in state}
    if contrastive and any(key.startswith("objectives.itc.") for key in state):
        raise CheckpointError("transformers has one contrastive head for an image: export either itc or contrastive")
    result = {} if bare else contrastive
    towers = {number: name for name, number in LINK_SCALES.items()}
    for match in filter(None, map(_OWN_SCALE.fullmatch, state)):
        for layer, number in enumerate(state[match[0]]):
            name = f"cross_modal_{match[1]}_link_tower.{layer}.{towers[match[2]]}"
            result[name if bare else f"bridgetower.{name}"] = number
    other = [*CONTRASTIVE.values(), *filter(_OWN_SCALE.fullmatch, state)]
    for key, tensor in to_official({k: v for k, v in state.items() if k not in other}).items():
        if key == "temperature":
            if not bare:
                result["logit_scale"] = -torch.log(tensor)
        elif HEAD.fullmatch(key):
            if not bare:
                result[key] = tensor
        elif not re.match(r"(vqa|snli|nlvr2)_classifier\.|rank_output\.", key):
            result[("" if bare else "bridgetower.") + transformers_name(key)] = tensor
    return result
