"""Small models of every kind, as bundles and as files of other programs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BridgeTowerConfig, PreTrainedModel

from bt.data.batch import Texts
from bt.data.text import Tokenizer, train_tokenizer
from bt.interop.folder import Bundle, build
from bt.models.bridgetower import BridgeTower, Fused, Need
from tests.golden_helpers import FOLDERS, table, tensors

WORDS = (
    "a the red green blue circle square dot dots ring is on in not how many what colour two three one of and big small"
)


def tokenizer() -> Tokenizer:
    """30 ids."""
    return train_tokenizer([WORDS])


def randomise(module: nn.Module) -> None:
    """Norms, biases and scales start at 1 and 0, where a swapped pair of them would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def nodes(**changes: Any) -> dict[str, Any]:
    """A BridgeTower with the heads MLM and ITM that every format can hold; changes: values by dotted key with "__"."""
    found: dict[str, Any] = {
        "encoder": {
            "vision": {
                "_target_": "bt.models.encoders.open_clip_vit.OpenClipVision",
                "name": None,
                "pretrained": None,
                "image_size": 24,
                "architecture": {"width": 64, "layers": 2, "patch_size": 8, "head_width": 64, "quick_gelu": True},
            },
            "text": {
                "_target_": "bt.models.encoders.hf_text.HFText",
                "name": None,
                "pretrained": False,
                "config": {
                    "model_type": "roberta",
                    "vocab_size": tokenizer().vocab_size,
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 128,
                    "max_position_embeddings": 34,
                    "type_vocab_size": 1,
                    "layer_norm_eps": 1e-5,
                    "pad_token_id": 1,
                },
                "tokenizer": {"kind": "trained", "vocab_size": 30},
            },
        },
        "bridge": {"_target_": "bt.models.bridges.add.AddBridge"},
        "cross": {
            "_target_": "bt.models.cross_modal.CoAttention",
            "width": 64,
            "heads": 2,
            "layers": 2,
            "ffn_ratio": 2,
            "norm_eps": 1e-12,
        },
        "task": {
            "texts": "captions",
            "metric": "itm/val/accuracy",
            "objectives": {"mlm": {"_target_": "bt.tasks.mlm.MLM"}, "itm": {"_target_": "bt.tasks.itm.ITM"}},
        },
        "data": {"max_text_len": 20, "eval_transform": "clip"},
        "plugins": [],
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = found
        for part in path:
            node = node[part]
        node[last] = deepcopy(value)
    return found


def objective(name: str, target: str, **options: Any) -> dict[str, Any]:
    """Changes for `nodes`: this objective alone."""
    return {"task__objectives": {name: {"_target_": target, **options}}}


def bundle(labels: dict[str, list[str]] | None = None, **changes: Any) -> Bundle:
    """Random weights."""
    made = Bundle(nodes(**changes), {}, labels=labels or {}, tokenizer=tokenizer(), source="a small model")
    model = build(made)
    randomise(model)
    made.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return made


def tower_of(made: Bundle) -> BridgeTower:
    model = build(made)
    model.load_state_dict(made.state)
    return model.eval().tower


def inputs(size: int, vocabulary: int = 30, pairs: int = 3) -> tuple[Tensor, Texts]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, 3, size, size, generator=generator)
    mask = torch.ones(pairs, 9, dtype=torch.bool)
    mask[-1, 5:] = False
    ids = torch.randint(5, vocabulary, (pairs, 9), generator=generator).masked_fill(~mask, 1)
    return images, Texts(ids, mask)


@torch.no_grad()
def fused(tower: BridgeTower, images: Tensor, texts: Texts) -> Fused:
    """Pair p of image p and text p, everything wanted."""
    pairs = torch.arange(len(images))[:, None].expand(-1, 2)
    return tower.fuse(tower.encode_images(images), tower.encode_texts(texts), pairs, Need(True, True, True))


def released_file(case: str, path: Path) -> dict[str, Tensor]:
    """The golden model of a bridge (FOLDERS) as its released code writes it; returns its state dict."""
    weights = tensors("bridgetower/weights")
    if case == "add":
        names = [*table("bridgetower/checkpoint")["state_dict"]]
        state = {name: weights[name] for name in names}
    else:
        own = tensors(f"{FOLDERS[case]}/weights")
        keys = table(f"{FOLDERS[case]}/keys")
        state = {name: own[name] if entry["from"] == "own" else weights[name] for name, entry in keys.items()}
    settings = table(f"{FOLDERS[case]}/config")["cross_modal_and_tasks"]
    settings |= {"tokenizer": "roberta-tiny", "val_transform_keys": ["clip"]}
    torch.save({"epoch": 1, "state_dict": state, "hyper_parameters": {"config": settings}, "callbacks": {}}, path)
    return state


def save_transformers(kind: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    """A small model of transformers with random weights, written by it."""
    sizes = {"layer_norm_eps": 3e-6, "hidden_dropout_prob": 0.0}
    config = BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        layer_norm_eps=2e-5,
        contrastive_hidden_size=16,
        logit_scale_init_value=2.6592,
        text_config={
            "vocab_size": 30,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 34,
            **sizes,
        },
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 24},
        **options,
    )
    model = kind(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model
