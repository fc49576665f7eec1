"""Writing models in other programs' formats, or saying why they cannot hold them.

A target format fixes what is an option here. Where that changes the outputs beyond rounding, or where there is no place
for a tensor, the export is refused with the reason; what differs within rounding (an epsilon) or in training alone
(dropout) is written as the target has it, said, and kept in a record beside the tensors, from which an import restores
it: bt.json in a folder, the entry `bt` of a .ckpt.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from bt.data.batch import Texts
from bt.engine.checkpoint import save_tensors
from bt.errors import CheckpointError
from bt.interop.architecture import LINK_TOWERS, RELEASED_EPS
from bt.interop.folder import Bundle, build, label_rows, new_folder
from bt.interop.huggingface import to_huggingface, transformers_name
from bt.interop.imports import RELEASED, Row, check, grouped, part_of
from bt.interop.managertower import to_managertower
from bt.interop.official import to_official
from bt.interop.source import RECORD
from bt.models.bridges.manager import ManagerBridge
from bt.models.bridgetower import Need
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision
from bt.tasks.base import TaskModel

FAMILY_OF_BRIDGE = {target: family for family, (_, target, _) in RELEASED.items()} | {
    "bt.models.bridges.manager.ManagerBridge": "managertower"
}
LINK_TOWER_OF_BRIDGE = {target: name for name, target in LINK_TOWERS.items()}
# Heads that a format has a place for; of the others, why not.
RELEASED_HEADS = ("mlm", "itm", "itc", "vqa", "nlvr2", "snli_ve", "irtr")
TRANSFORMERS_HEADS = ("mlm", "itm", "contrastive")
WHY_NOT = {
    "contrastive": "the released code has no contrastive head on the fused pair",
    "itc": "transformers' contrastive image head reads the projected image, this one reads it before the projection",
}


@dataclass
class Sizes:
    """What a model is built of, read off the module itself, so that every default is resolved."""

    model: TaskModel
    bridge: str
    text: Any = None  # the configuration of transformers
    refused: list[str] = field(default_factory=list)
    # Dotted key: (value here, value of the target).
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def need(self, holds: bool, reason: str) -> None:
        if not holds:
            self.refused.append(reason)

    def say(self, key: str, own: Any, target: Any) -> None:
        if own != target:
            self.differs[key] = (own, target)

    @property
    def cross_layer(self) -> Any:
        return self.model.tower.cross.text_layers[0]


def measure(bundle: Bundle) -> Sizes:
    """The model's sizes, and what neither of the formats can hold."""
    check(bundle)
    model = build(bundle, "meta")
    tower, bridge = model.tower, bundle.nodes["bridge"]
    sizes = Sizes(model, str(bridge["_target_"]))
    sizes.need(isinstance(tower.vision, OpenClipVision), "its image encoder is no CLIP ViT")
    sizes.need(isinstance(tower.text, HFText), "its text encoder is none of transformers")
    sizes.need(
        type(tower.cross) is CoAttention and tower.cross.layers > 0, "its cross-modal layers are no co-attention"
    )
    if sizes.refused:
        return sizes
    sizes.text = tower.text.model.config
    block, conv = tower.vision.visual.transformer.resblocks[0], tower.vision.visual.conv1
    sizes.need(isinstance(block.mlp.gelu, QuickGELU), "its image encoder has GELU, the target QuickGELU")
    sizes.need(block.attn.head_dim == 64, f"its image encoder's heads are {block.attn.head_dim} wide, the target's 64")
    hidden = block.mlp.c_fc.out_features / tower.vision.width
    sizes.need(hidden == 4, f"its image encoder's feed-forward layers are {hidden:g} times as wide, the target's 4")
    sizes.need(conv.in_channels == 3, f"its images have {conv.in_channels} channels, the target's 3")
    sizes.need(not sizes.cross_layer.ffn.pre, "its cross-modal layers have their norms before the sub-layers")
    sizes.need(bridge.get("sides", "both") == "both", f"bridge.sides={bridge.get('sides')}")
    sizes.need(bridge.get("uni_layers", "top") == "top", f"bridge.uni_layers={bridge.get('uni_layers')}")
    sizes.need(tower.text.cls == "first", "its text encoder's last token stands for the text")
    return sizes


def _need_heads(sizes: Sizes, bundle: Bundle, heads: tuple[str, ...]) -> None:
    for name in dict.fromkeys(key.split(".")[1] for key in bundle.state if key.startswith("objectives.")):
        reason = WHY_NOT.get(name, "the format has no place for it")
        sizes.need(name in heads, f"the head {name}: {reason}; leave it out by --leave-out {name}")


def _refuse(sizes: Sizes, target: str) -> None:
    if sizes.refused:
        raise CheckpointError(f"{target} cannot hold this model: {'; '.join(sizes.refused)}")


def _record(bundle: Bundle, sizes: Sizes) -> dict[str, Any]:
    """What the target has no place for, as JSON values; see bt.interop.imports.restore_record."""
    record: dict[str, Any] = {"labels": bundle.labels, "settings": {k: list(v) for k, v in sizes.differs.items()}}
    temperature = bundle.state.get("objectives.itc.temperature")
    return record | ({} if temperature is None else {"temperature": temperature.item()})


def _rows(bundle: Bundle, kept: dict[str, Tensor], sizes: Sizes, others: dict[str, str]) -> list[Row]:
    rows = grouped("written", bundle.state, part_of)
    rows += grouped("written", kept, str, "unused by the model, as it was read")
    left = {key: tensor for key, tensor in bundle.unused.items() if key not in kept}
    rows += grouped("left out", left, str, "the model never uses it, and the target has no such tensor")
    for key, (own, target) in sizes.differs.items():
        rows.append(Row("differs", key, 0, 0, f"{own} here, {target} there; an import of bt restores it"))
    return rows + [Row("said", part, 0, 0, note) for part, note in others.items()]


# --- the released code -------------------------------------------------------------------------------------------


def export_released(bundle: Bundle, out: Path) -> list[Row]:
    """A .ckpt in the form of BridgeTower's, METER's or ManagerTower's released code, whichever has this bridge."""
    sizes = measure(bundle)
    family = FAMILY_OF_BRIDGE.get(sizes.bridge)
    sizes.need(family is not None, f"the bridge {sizes.bridge.rpartition('.')[2]}: the released codes have no such")
    if not sizes.refused:
        _check_released(sizes, bundle, str(family))
    _refuse(sizes, "the released code")
    tower = sizes.model.tower
    if family == "managertower":
        depth = {"text": tower.text.depth, "image": tower.vision.depth}
        state = to_managertower(bundle.state, depth, bundle.unused)
    else:
        state = to_official(bundle.state)
    same = bundle.origin.get("format") == family
    kept = {
        key: tensor
        for key, tensor in bundle.unused.items()
        if key not in state and (same or key.startswith("text_transformer.pooler."))
    }
    settings = bundle.origin.get("settings") if same else None
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": {key: whole(tensor) for key, tensor in (state | kept).items()},
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": settings or released_settings(bundle, sizes, str(family))},
        RECORD: _record(bundle, sizes),
    }
    _save(content, out)
    return _rows(bundle, kept, sizes, {})


def _check_released(sizes: Sizes, bundle: Bundle, family: str) -> None:
    tower, text, layer = sizes.model.tower, sizes.text, sizes.cross_layer
    kind = text.model_type
    sizes.need(
        kind in ("roberta", "bert"), f"its text encoder is of the kind {kind}, the released code's RoBERTa or BERT"
    )
    ratio = layer.ffn.up.out_features / tower.width
    sizes.need(ratio == int(ratio), f"cross.ffn_ratio={ratio}: the released code takes whole numbers")
    if family == "bridgetower":
        same = tower.text.depth == tower.vision.depth
        sizes.need(
            same, f"encoders of {tower.text.depth} and {tower.vision.depth} layers: the released code's are equal"
        )
    rows, pairs = len(tower.type_embeddings.weight), "nlvr2" in bundle.objectives()
    sizes.need(rows == (3 if pairs else 2), f"{rows} token types: the released code has 3 with the head nlvr2, else 2")
    _need_heads(sizes, bundle, RELEASED_HEADS)
    width = tower.width
    if "itc" in bundle.objectives():
        sizes.need(tower.text.width == tower.vision.width == width, "ITC needs encoders of the cross-modal width")
    labels = label_rows(bundle.state)
    for name, classes in (("nlvr2", 2), ("snli_ve", 3)):
        sizes.need(
            labels.get(name, classes) == classes, f"the head {name} has {labels.get(name)} classes, not {classes}"
        )
    sizes.say("cross.norm_eps", layer.ffn.norm.eps, RELEASED_EPS)
    if "mlm" in sizes.model.objectives:
        sizes.say("task.objectives.mlm.norm_eps", sizes.model.objectives["mlm"].head.norm.eps, RELEASED_EPS)
    bridge = tower.text_bridge
    if hasattr(bridge, "norms"):
        sizes.say("bridge.norm_eps", bridge.norms[0].eps, 1e-5)
    if isinstance(bridge, ManagerBridge):
        sizes.say("bridge.attend_padding", bundle.nodes["bridge"].get("attend_padding", False), True)
    # The released code takes these from the text encoder's own configuration, an import from what that has as a rule.
    sizes.say("encoder.text.config.num_attention_heads", text.num_attention_heads, max(text.hidden_size // 64, 1))
    sizes.say("encoder.text.config.layer_norm_eps", text.layer_norm_eps, 1e-5 if kind == "roberta" else 1e-12)


def released_settings(bundle: Bundle, sizes: Sizes, family: str) -> dict[str, Any]:
    """The released code's options that say what the model is; those of its training are its own defaults."""
    tower, text, layer = sizes.model.tower, sizes.text, sizes.cross_layer
    vision, objectives = tower.vision, sizes.model.objectives
    data = bundle.nodes.get("data", {})
    labels = label_rows(bundle.state)
    losses = {"snli_ve": "snli"}
    settings = {
        "model_type": {"bridgetower": "BT", "managertower": "MT"}.get(family, "METER"),
        "meter_fusion": family == "meter_fusion",
        "loss_names": {losses.get(name, name): 1 for name in objectives},
        "image_size": vision.image_size,
        "patch_size": vision.visual.conv1.kernel_size[0],
        "resolution_before": vision.image_size,
        "input_image_embed_size": vision.width,
        "input_text_embed_size": tower.text.width,
        "hidden_size": tower.width,
        "num_heads": layer.self_attention.heads,
        "num_layers": tower.cross.layers,
        "mlp_ratio": layer.ffn.up.out_features // tower.width,
        "drop_rate": layer.ffn.dropout.p,
        "vocab_size": tower.text.vocab_size,
        "tokenizer": f"{text.model_type}-base" if text.model_type == "roberta" else "bert-base-uncased",
        "max_text_len": data.get("max_text_len", 50),
        "val_transform_keys": [data.get("eval_transform", "clip")],
        "vqav2_label_size": labels.get("vqa", 3129),
    }
    for name in ("vqa", "nlvr2", "snli_ve"):
        if name in objectives:
            head = objectives[name].head
            settings |= {"task_head_layers": 2 if len(head) > 1 else 1}
            if len(head) > 1:
                settings |= {"head_hidden_scale": head[0].out_features / (2 * tower.width)}
    if "itc" in objectives:
        settings["contrastive_hidden_size"] = objectives["itc"].text_head.fc.out_features
    if isinstance(tower.text_bridge, ManagerBridge):
        settings |= {
            "manager_type": {"adaptive": "AAUE", "static": "SAUE"}[bundle.nodes["bridge"].get("kind", "adaptive")],
            "managed_layers_text": tower.text_bridge.states,
            "managed_layers_image": tower.image_bridge.states,
            "manager_weight_type": bundle.nodes["bridge"].get("weights", "vector"),
        }
    return settings


def whole(tensor: Tensor) -> Tensor:
    """A tensor that fills its storage: torch.save writes all of a storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _save(content: dict[str, Any], out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} exists already: give another --out")
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        temporary.replace(out)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# --- transformers ------------------------------------------------------------------------------------------------


def export_transformers(bundle: Bundle, out: Path) -> list[Row]:
    """A folder that transformers' BridgeTower classes load."""
    sizes = measure(bundle)
    if not sizes.refused:
        _check_transformers(sizes, bundle)
    _refuse(sizes, "transformers")
    same = bundle.origin.get("format") == "transformers"
    bare = bool(same and bundle.origin.get("bare") and not bundle.objectives())
    state = to_huggingface(bundle.state, bare)
    kept = {key: tensor for key, tensor in bundle.unused.items() if same or key.startswith("text_transformer.pooler.")}
    heads = ("logit_scale", "mlm_score.")
    for key, tensor in kept.items():
        name = key if key.startswith(heads) else ("" if bare else "bridgetower.") + transformers_name(key)
        state[name] = tensor
    with new_folder(out) as folder:
        config = transformers_config(bundle, sizes)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_tensors(state, folder / "model.safetensors", {"format": "pt"})
        (folder / f"{RECORD}.json").write_text(json.dumps(_record(bundle, sizes), indent=1) + "\n")
        said = write_processor(bundle, sizes, folder)
    return _rows(bundle, kept, sizes, said)


def _check_transformers(sizes: Sizes, bundle: Bundle) -> None:
    tower, text, layer = sizes.model.tower, sizes.text, sizes.cross_layer
    wanted = ", ".join(LINK_TOWERS)
    bridge = sizes.bridge.rpartition(".")[2]
    sizes.need(sizes.bridge in LINK_TOWER_OF_BRIDGE, f"the bridge {bridge}: transformers has {wanted}")
    sizes.need(
        text.model_type == "roberta", f"its text encoder is of the kind {text.model_type}, transformers' RoBERTa"
    )
    same = tower.text.depth == tower.vision.depth
    sizes.need(same, f"encoders of {tower.text.depth} and {tower.vision.depth} layers: transformers' are equal")
    rows = len(tower.type_embeddings.weight)
    sizes.need(rows == 2, f"{rows} token types (NLVR2): transformers has 2")
    # Its cross-modal layers are built from the text configuration.
    text_of = "transformers builds the cross-modal layers like the text encoder's"
    sizes.need(tower.width == text.hidden_size, f"cross.width={tower.width}: {text_of}, {text.hidden_size} wide")
    heads, hidden = layer.self_attention.heads, layer.ffn.up.out_features
    sizes.need(heads == text.num_attention_heads, f"cross.heads={heads}: {text_of}, {text.num_attention_heads} heads")
    sizes.need(hidden == text.intermediate_size, f"a FFN of {hidden}: {text_of}, FFN {text.intermediate_size}")
    # What came from there goes back there.
    read = ("itc",) if bundle.origin.get("format") == "transformers" else ()
    _need_heads(sizes, bundle, (*TRANSFORMERS_HEADS, *read))
    if sizes.refused:
        return
    sizes.say("cross.norm_eps", layer.ffn.norm.eps, text.layer_norm_eps)
    if "mlm" in sizes.model.objectives:
        eps = sizes.model.objectives["mlm"].head.norm.eps
        sizes.say("task.objectives.mlm.norm_eps", eps, tower.text_bridge.norms[0].eps)
    sizes.say("cross.dropout", layer.ffn.dropout.p, text.hidden_dropout_prob)
    data = bundle.nodes.get("data", {})
    longest = min(50, tower.text.max_positions)
    sizes.say("data.max_text_len", data.get("max_text_len", longest), longest)
    sizes.say("data.eval_transform", data.get("eval_transform", "clip"), "clip")


# The head that a folder has most use for names its class, for AutoModel.
CLASSES = {
    "contrastive": "BridgeTowerForContrastiveLearning",
    "mlm": "BridgeTowerForMaskedLM",
    "itm": "BridgeTowerForImageAndTextRetrieval",
}


def transformers_config(bundle: Bundle, sizes: Sizes) -> dict[str, Any]:
    """config.json: what was read, if it was transformers' own, else what says the model."""
    from transformers import BridgeTowerConfig

    if bundle.origin.get("format") == "transformers":
        return bundle.origin["settings"]
    tower, text, vision = sizes.model.tower, sizes.text, sizes.model.tower.vision
    objectives = sizes.model.objectives
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings type_vocab_size layer_norm_eps pad_token_id"
    )
    tokenizer = bundle.tokenizer
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    extra = {}
    if "contrastive" in objectives:
        extra = {
            "contrastive_hidden_size": objectives["contrastive"].text_head.fc.out_features,
            "logit_scale_init_value": bundle.state["objectives.contrastive.logit_scale"].item(),
        }
    config = BridgeTowerConfig(
        hidden_size=tower.width,
        num_attention_heads=sizes.cross_layer.self_attention.heads,
        num_hidden_layers=tower.cross.layers,
        layer_norm_eps=tower.text_bridge.norms[0].eps,
        link_tower_type=LINK_TOWER_OF_BRIDGE[sizes.bridge],
        text_config={name: getattr(text, name) for name in names.split()} | ends,
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "patch_size": vision.visual.conv1.kernel_size[0],
            "image_size": vision.image_size,
        },
        architectures=[next((CLASSES[name] for name in CLASSES if name in objectives), "BridgeTowerModel")],
        **extra,
    )
    return json.loads(config.to_json_string(use_diff=False))


def write_processor(bundle: Bundle, sizes: Sizes, folder: Path) -> dict[str, str]:
    """The files that BridgeTowerProcessor loads, as far as they can be had; returns what is to be said of them."""
    from transformers import BridgeTowerImageProcessor, BridgeTowerProcessor, PreTrainedTokenizerFast

    size, said = sizes.model.tower.vision.image_size, {}
    # Their sides are rounded to multiples of size_divisor, 32 in the released folders.
    divisor = 32 if size % 32 == 0 else sizes.model.tower.vision.visual.conv1.kernel_size[0]
    images = BridgeTowerImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, size_divisor=divisor
    )
    if (name := bundle.nodes.get("data", {}).get("eval_transform", "clip")) not in ("clip",):
        said["image processor"] = f"the model saw images of the transform {name}, transformers has only that of clip"
    if bundle.tokenizer is None:
        images.save_pretrained(folder)
        node = bundle.nodes["encoder"]["text"]["tokenizer"]
        said["processor"] = (
            f"no tokenizer at hand ({node.get('name') or 'none is named'}): only the image processor is written; "
            "--tokenizer FOLDER adds it"
        )
        return said
    roles = bundle.tokenizer.special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bundle.tokenizer.backend,
        bos_token=roles["bos"],
        cls_token=roles["bos"],
        eos_token=roles["eos"],
        sep_token=roles["eos"],
        pad_token=roles["pad"],
        mask_token=roles["mask"],
        model_max_length=sizes.model.tower.text.max_positions,
    )
    BridgeTowerProcessor(images, tokenizer).save_pretrained(folder)
    return said


@torch.no_grad()
def compare_transformers(bundle: Bundle, folder: Path) -> list[Row]:
    """Loads a written folder with transformers, and says how far its outputs are from those of the model here."""
    from transformers import BridgeTowerModel

    ours = build(bundle)
    ours.load_state_dict(bundle.state)
    tower = ours.eval().tower
    theirs = BridgeTowerModel.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    size, rows, pad = tower.vision.image_size, tower.text.vocab_size, tower.text.pad_id
    images = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(5, rows, (2, min(12, tower.text.max_positions)), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, ids.shape[1] // 2 :] = False
    ids = ids.masked_fill(~mask, pad)
    given = theirs(input_ids=ids, attention_mask=mask.long(), pixel_values=images)
    pairs = torch.arange(2)[:, None].expand(-1, 2)
    fused = tower.fuse(tower.encode_images(images), tower.encode_texts(Texts(ids, mask)), pairs, Need(True, True, True))
    found = {"pooler_output": fused.cls, "text_features": fused.text, "image_features": fused.image}
    return [
        Row("compared", name, 0, 0, f"largest difference {(getattr(given, name) - own).abs().max().item():.2e}")
        for name, own in found.items()
    ]
