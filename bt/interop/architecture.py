"""The configuration that stands for another program's checkpoint: from its tensors' shapes and its own settings.

Sizes are read off the tensors. What these do not show comes from the settings beside them (heads, image transform,
epsilons of transformers), else it is what the released code fixes: QuickGELU, one head for each 64 of an encoder's
width, epsilon 1e-12 in the cross-modal layers and the MLM head and 1e-5 elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from bt.errors import CheckpointError

Node = dict[str, Any]

RELEASED_EPS = 1e-12  # a RoBERTa configuration's default, which the released cross-modal layers are built with
HEAD_WIDTH = 64
# Rows of the word table: model type, name of the tokenizer.
VOCABULARIES = {50265: ("roberta", "FacebookAI/roberta-base"), 30522: ("bert", "google-bert/bert-base-uncased")}
# Of the text encoders: epsilon, padding id, kinds of segment.
TEXT_DEFAULTS = {"roberta": (1e-5, 1), "bert": (1e-12, 0)}
LINK_TOWERS = {
    "add": "bt.models.bridges.add.AddBridge",
    "scaled_add": "bt.models.bridges.weighted.ScaledAddBridge",
    "interpolate": "bt.models.bridges.weighted.InterpolateBridge",
}
BRIDGE_DEFAULTS = {"sides": "both", "uni_layers": "top", "stop_gradient": False}
# Objective: its class, the texts that its task reads, the metric that chooses a checkpoint; the first one that a
# checkpoint has says what the task is.
OBJECTIVES = {
    "vqa": ("bt.tasks.vqa.VQA", "questions", "vqa/val/score"),
    "nlvr2": ("bt.tasks.nlvr2.NLVR2", "statements", "nlvr2/val/accuracy"),
    "snli_ve": ("bt.tasks.snli_ve.SNLIVE", "hypotheses", "snli_ve/val/accuracy"),
    "irtr": ("bt.tasks.irtr.IRTR", "captions", "irtr/val/loss"),
    "itm": ("bt.tasks.itm.ITM", "captions", "itm/val/accuracy"),
    "mlm": ("bt.tasks.mlm.MLM", "captions", "mlm/val/accuracy"),
    "itc": ("bt.tasks.itc.ITC", "captions", "itc/val/loss"),
    "contrastive": ("bt.tasks.contrastive.Contrastive", "captions", "contrastive/val/loss"),
}


def count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers the one group of `pattern` takes at the start of the keys."""
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def vision_node(state: Mapping[str, Tensor], quick_gelu: bool = True, prefix: str = "tower.vision.visual.") -> Node:
    """encoder.vision of a CLIP ViT: `state` has its tensors by open_clip's names behind `prefix`."""
    width, channels, patch, _ = state[f"{prefix}conv1.weight"].shape
    grid = math.isqrt(len(state[f"{prefix}positional_embedding"]) - 1)
    hidden = len(state[f"{prefix}transformer.resblocks.0.mlp.c_fc.bias"])
    return {
        "_target_": "bt.models.encoders.open_clip_vit.OpenClipVision",
        "name": None,
        "pretrained": None,
        "image_size": grid * patch,
        "channels": channels,
        "remove_last_layers": 0,
        "architecture": {
            "width": width,
            "layers": count(state, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."),
            "patch_size": patch,
            "head_width": HEAD_WIDTH,
            "mlp_ratio": number(hidden / width),
            "quick_gelu": quick_gelu,
        },
        "freeze": "none",
    }


def text_node(state: Mapping[str, Tensor], settings: Mapping[str, Any], prefix: str = "tower.text.model.") -> Node:
    """encoder.text of RoBERTa or BERT; settings: what is known beside the shapes, by transformers' names."""
    rows, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    kinds = len(state[f"{prefix}embeddings.token_type_embeddings.weight"])
    # A BERT has two kinds of segment, a RoBERTa one.
    kind = settings.get("model_type") or VOCABULARIES.get(rows, ("bert" if kinds > 1 else "roberta", None))[0]
    eps, pad = TEXT_DEFAULTS[kind]
    known = {
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": count(state, rf"{re.escape(prefix)}encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "intermediate_size": len(state[f"{prefix}encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(state[f"{prefix}embeddings.position_embeddings.weight"]),
        "type_vocab_size": kinds,
        "layer_norm_eps": eps,
        "pad_token_id": pad,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    return {
        "_target_": "bt.models.encoders.hf_text.HFText",
        "name": None,
        "pretrained": False,
        "config": known | {key: settings[key] for key in known if settings.get(key) is not None},
        "dropout": None,
        "cls": "first",
        "tokenizer": tokenizer_node(rows),
        "freeze": "none",
    }


def tokenizer_node(rows: int, kept: bool = False) -> Node:
    """encoder.text.tokenizer. kept: there is a tokenizer.json beside the weights, which is taken whatever it is."""
    name = VOCABULARIES.get(rows, (None, None))[1]
    if kept or name is None:
        return {"kind": "trained", "vocab_size": rows}
    return {"kind": "pretrained", "name": name}


def cross_node(state: Mapping[str, Tensor], heads: int | None, norm_eps: float, dropout: float) -> Node:
    """`cross` of the co-attention layers of a tower."""
    start = "tower.cross.text_layers."
    width = len(state["tower.text_projection.bias"])
    hidden = len(state[f"{start}0.ffn.up.bias"])
    return {
        "_target_": "bt.models.cross_modal.CoAttention",
        "width": width,
        "heads": heads or max(width // HEAD_WIDTH, 1),
        "layers": count(state, rf"{re.escape(start)}(\d+)\."),
        "ffn_ratio": number(hidden / width),
        "dropout": dropout,
        "norm_eps": norm_eps,
        "init_std": 0.02,
        "norm": "post",
    }


def task_node(state: Mapping[str, Tensor], width: int, mlm_eps: float, settings: Mapping[str, Any]) -> Node:
    """`task` with an objective for every head in `state`, the heads' sizes read off the tensors."""
    found = {key.split(".")[1] for key in state if key.startswith("objectives.")}
    named = [name for name in OBJECTIVES if name in found]
    objectives = {name: {"_target_": OBJECTIVES[name][0], "weight": 1.0} for name in named}
    if "mlm" in objectives:
        objectives["mlm"]["norm_eps"] = mlm_eps
    if "itm" in objectives:
        objectives["itm"]["negatives"] = "batch"
    for name in ("itc", "contrastive"):
        if name in objectives:
            objectives[name]["size"] = len(state[f"objectives.{name}.text_head.fc.bias"])
    for name in ("vqa", "nlvr2", "snli_ve"):
        if name in objectives:
            layers = 2 if f"objectives.{name}.head.3.weight" in state else 1
            objectives[name]["layers"] = layers
            if layers == 2:
                objectives[name]["hidden_scale"] = number(len(state[f"objectives.{name}.head.0.bias"]) / (2 * width))
    if "nlvr2" in objectives:
        objectives["nlvr2"]["dropout"] = settings.get("nlvr2_drop_rate", 0.1)
    texts, metric = OBJECTIVES[named[0]][1:] if named else ("captions", None)
    mode = "min" if metric and metric.endswith("loss") else "max"
    node = {"texts": texts, "mode": mode, "objectives": objectives, "evaluators": {}, "batch_metrics": True}
    return node | ({"metric": metric} if metric else {})


def number(value: float) -> int | float:
    """Whole numbers without a point."""
    return int(value) if float(value).is_integer() else value


def released_nodes(state: Mapping[str, Tensor], bridge: Node, settings: Mapping[str, Any]) -> dict[str, Node]:
    """The configuration of a released BridgeTower, METER or ManagerTower; state: under own names."""
    known = {} if "roberta" not in str(settings.get("tokenizer", "")) else {"model_type": "roberta"}
    dropout = settings.get("drop_rate", 0.1)
    transforms = settings.get("val_transform_keys") or ["clip"]
    cross = cross_node(state, settings.get("num_heads"), RELEASED_EPS, dropout)
    text = text_node(state, known)
    return {
        "encoder": {"vision": vision_node(state), "text": text},
        "bridge": bridge | BRIDGE_DEFAULTS,
        "cross": cross,
        "task": task_node(state, cross["width"], RELEASED_EPS, settings),
        "data": {
            "max_text_len": most(settings.get("max_text_len"), text),
            "eval_transform": eval_transform(transforms[0]),
        },
    }


def most(tokens: int | None, text: Node) -> int:
    """The longest text: what the other program took, as far as the position table goes."""
    sizes = text["config"]
    # RoBERTa counts positions from pad id + 1.
    unused = sizes["pad_token_id"] + 1 if sizes["model_type"] == "roberta" else 0
    return min(tokens or 50, sizes["max_position_embeddings"] - unused)


def eval_transform(name: str) -> str:
    """The evaluation's transform by the name of any of its family (clip_randaug: clip)."""
    family = str(name).partition("_")[0]
    return family if family in ("clip", "imagenet", "vit", "blip", "albef") else "clip"


def manager_node(state: Mapping[str, Tensor], released: Mapping[str, Any]) -> Node:
    """`bridge` of a released ManagerTower; state: under own names."""
    manager = "tower.text_bridge.managers."
    adaptive = any(key.endswith(".controller.weight") for key in state)
    scores = state[f"{manager}0.scores"]
    other = len(state["tower.image_bridge.layer_embeddings.weight"])
    if other != len(scores):
        raise CheckpointError(f"managers of {len(scores)} text layers and {other} image layers: here both have as many")
    return {
        "_target_": "bt.models.bridges.manager.ManagerBridge",
        "kind": "adaptive" if adaptive else "static",
        "managed": len(scores),
        "weights": "vector" if scores.shape[-1] > 1 else "scalar",
        "temperature": released.get("manager_softmax_temperature", 1.0),
        "noise": True,
        "attend_padding": True,  # as the released managers do
        "norm_eps": 1e-5,
        "init_std": 0.02,
    }


def transformers_nodes(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Node]:
    """The configuration of a BridgeTower of transformers; state: under own names; config: BridgeTowerConfig, complete.

    Raises CheckpointError for what transformers has and the model here has not.
    """
    text, vision = config["text_config"], config["vision_config"]
    kind = config["link_tower_type"]
    wanted = (
        (kind in LINK_TOWERS, f"link_tower_type={kind}", ", ".join(LINK_TOWERS)),
        (config["share_cross_modal_transformer_layers"], "share_cross_modal_transformer_layers=false", "true"),
        (not config["share_link_tower_layers"], "share_link_tower_layers=true", "false"),
        (not vision["remove_last_layer"], "vision_config.remove_last_layer=true", "false"),
        (vision["layer_norm_eps"] == 1e-5, f"vision_config.layer_norm_eps={vision['layer_norm_eps']}", "1e-5"),
        (config["hidden_act"] == text["hidden_act"] == "gelu", "another hidden_act", "gelu, in text_config too"),
    )
    for holds, what, allowed in wanted:
        if not holds:
            raise CheckpointError(f"config.json has {what}, which the model here has not: it takes {allowed}")
    eps = text["layer_norm_eps"]
    cross = cross_node(state, text["num_attention_heads"], eps, text["hidden_dropout_prob"])
    bridge = {"_target_": LINK_TOWERS[kind], "norm_eps": config["layer_norm_eps"]}
    encoder = text_node(state, text | {"model_type": "roberta"})
    return {
        "encoder": {"vision": vision_node(state), "text": encoder},
        "bridge": bridge | BRIDGE_DEFAULTS,
        "cross": cross,
        "task": task_node(state, cross["width"], config["layer_norm_eps"], {}),
        "data": {"max_text_len": most(None, encoder), "eval_transform": "clip"},
    }
