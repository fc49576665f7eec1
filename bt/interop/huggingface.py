"""State dicts of transformers' BridgeTower classes, to and from a TaskModel's, by way of the released names.

transformers renames little of the released model: the prefix `bridgetower.` (task classes; the bare BridgeTowerModel
has none), `text_model`, `vision_model` and the three tensors of the image embedding. Differences of substance:
- the temperature is stored as logit_scale = -ln(temperature);
- ForContrastiveLearning has a third head, on the fused [CLS] (`itc_cross_modal_head`), and its image head reads the
  projected image [CLS], where the released one reads it before the projection: where the third head is there, all three
  and the scale are those of bt.tasks.contrastive, not of ITC;
- the epsilon of the cross-modal norms and of the MLM head's is 1e-5 (text_config.layer_norm_eps), of the released
  code 1e-12: set `cross.norm_eps` and `task.objectives.mlm.norm_eps` to what the weights were trained with;
- learned scales of other link towers (`scaled_factor`, `beta`) have no released name: refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bt.errors import CheckpointError
from bt.interop.official import from_official, to_official

# transformers' name without the prefix "bridgetower.", released name.
IMAGE_EMBEDDING = {
    "vision_model.visual.embeddings.class_embedding": "vit_model.visual.class_embedding",
    "vision_model.visual.embeddings.patch_embedding.weight": "vit_model.visual.conv1.weight",
    "vision_model.visual.embeddings.position_embedding.weight": "vit_model.visual.positional_embedding",
}
PREFIXES = {"vision_model.visual.": "vit_model.visual.", "text_model.": "text_transformer."}
# Constant buffers of older releases.
DROPPED = re.compile(r".*\.position_ids|.*\.token_type_ids")
# transformers' head, own head.
CONTRASTIVE = {
    f"itc_{head}_head.fc.{part}": f"objectives.contrastive.{own}_head.fc.{part}"
    for head, own in (("text", "text"), ("image", "image"), ("cross_modal", "cross"))
    for part in ("weight", "bias")
} | {"logit_scale": "objectives.contrastive.logit_scale"}
# Keys of the task classes that stand beside `bridgetower.`, not below it.
HEAD = re.compile(r"(mlm_score|itm_score|itc_text_head|itc_image_head)\..+")


def _released_name(key: str) -> str:
    key = key.removeprefix("bridgetower.")
    if key in IMAGE_EMBEDDING:
        return IMAGE_EMBEDDING[key]
    for own, released in PREFIXES.items():
        if key.startswith(own):
            return released + key.removeprefix(own)
    return key


def _transformers_name(key: str) -> str:
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
    for key, tensor in state.items():
        if key == "logit_scale":
            released["temperature"] = torch.exp(-tensor)
        elif not DROPPED.fullmatch(key):
            released[_released_name(key)] = tensor
    # A tied decoder bias appears twice in transformers' state dicts.
    released.pop("mlm_score.decoder.bias", None)
    return from_official(released) | contrastive


def to_huggingface(state: Mapping[str, Tensor], bare: bool = False) -> dict[str, Tensor]:
    """The inverse: own names -> those of transformers' task classes, or of BridgeTowerModel (`bare`; without heads).

    Heads that transformers has no class for (VQA, SNLI-VE, NLVR2, ranking) are left out, as is what it never uses.
    """
    contrastive = {key: state[own] for key, own in CONTRASTIVE.items() if own in state}
    if contrastive and any(key.startswith("objectives.itc.") for key in state):
        raise CheckpointError("transformers has one contrastive head for an image: export either itc or contrastive")
    result = {} if bare else contrastive
    for key, tensor in to_official({k: v for k, v in state.items() if k not in CONTRASTIVE.values()}).items():
        if key == "temperature":
            if not bare:
                result["logit_scale"] = -torch.log(tensor)
        elif HEAD.fullmatch(key):
            if not bare:
                result[key] = tensor
        elif not re.match(r"(vqa|snli|nlvr2)_classifier\.|rank_output\.", key):
            result[("" if bare else "bridgetower.") + _transformers_name(key)] = tensor
    return result
