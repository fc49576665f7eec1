"""Models as the released codes of BridgeTower, METER and ManagerTower write them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bt.errors import CheckpointError
from bt.interop.architecture import RELEASED_EPS
from bt.interop.exports import Sizes, measure, need_heads, record_of, refuse, rows_of
from bt.interop.folder import Bundle, label_rows
from bt.interop.imports import RELEASED, Row
from bt.interop.managertower import to_managertower
from bt.interop.official import to_official
from bt.interop.record import RECORD
from bt.models.bridges.manager import ManagerBridge

FAMILY_OF_BRIDGE = {target: family for family, (_, target, _) in RELEASED.items()} | {
    "bt.models.bridges.manager.ManagerBridge": "managertower"
}
HEADS = ("mlm", "itm", "itc", "vqa", "nlvr2", "snli_ve", "irtr")


def export_released(bundle: Bundle, out: Path) -> list[Row]:
    """A .ckpt in the form of BridgeTower's, METER's or ManagerTower's released code, whichever has this bridge."""
    if out.suffix != ".ckpt":
        raise CheckpointError(f"{out}: the released code's format is a file, its name must end in .ckpt")
    with _new_file(out) as file:
        content, rows = _released(bundle)
        _save(content, file)
    return rows


def _released(bundle: Bundle) -> tuple[dict[str, Any], list[Row]]:
    """What the file holds, and the report."""
    sizes = measure(bundle)
    family = FAMILY_OF_BRIDGE.get(sizes.bridge)
    sizes.need(family is not None, f"the bridge {sizes.bridge.rpartition('.')[2]}: the released codes have no such")
    if not sizes.refused:
        _check_released(sizes, bundle, str(family))
    refuse(sizes, "the released code")
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
        RECORD: record_of(bundle, sizes),
    }
    return content, rows_of(bundle, kept, sizes, {})


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
    need_heads(sizes, bundle, HEADS)
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


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # Of a full disk torch says where in its own code it failed; the file's error is behind that.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextlib.contextmanager
def _new_file(out: Path) -> Iterator[BinaryIO]:
    """A file that becomes `out` when all is written. Raises CheckpointError where `out` exists or cannot be made."""
    if out.exists():
        raise CheckpointError(f"{out} exists already: give another --out")
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
