"""CLIP's and RoBERTa's own weights, as a pre-trained encoder: encoder/vision=imported, encoder/text=imported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bt.engine.checkpoint import save_tensors
from bt.errors import CheckpointError
from bt.interop.architecture import text_node, vision_node
from bt.interop.folder import new_folder, write_options
from bt.interop.imports import Row, check_tokenizer, find_tokenizer, grouped, set_value, token_roles
from bt.interop.source import Source

# Of a CLIP file, beside the image trunk: what it is, and why it is not read.
CLIP_REST = (
    (r"visual\.proj", "projection to the common space, which the tower replaces"),
    (r"logit_scale|input_resolution|context_length|vocab_size|logit_bias", "of the contrastive loss, or a constant"),
    (
        r"(text\.)?(transformer\..+|token_embedding\..+|positional_embedding|text_projection|ln_final\..+|attn_mask)",
        None,
    ),
)
TEXT_REST = (
    (r"pooler\..+", "pooler, which the tower does not call"),
    (r"(lm_head|cls|classifier)\..+", "head of the pre-training"),
    (r"embeddings\.(position_ids|token_type_ids)", "a constant"),
)


def import_clip(source: Source, out: Path, changes: Mapping[str, Any]) -> tuple[list[Row], str]:
    """The image tower of an OpenAI or open_clip CLIP; returns the report and how to use what was written."""
    tensors = {key.removeprefix("module."): tensor for key, tensor in source.tensors.items()}
    if not any(".resblocks." in key for key in tensors if key.startswith("visual.")):
        raise CheckpointError(f"{source.path}: its image tower is no ViT")
    rest, rows = _rest(tensors, CLIP_REST, "text tower, which the tower does not read")
    # OpenAI's weights were trained with QuickGELU, open_clip's own with GELU as a rule; a file does not say it.
    quick = "input_resolution" in tensors or "quickgelu" in source.path.name.lower() or "openai" in str(source.path)
    own = {key: tensor.float() for key, tensor in tensors.items() if key not in rest}
    node = vision_node(own, quick, "visual.") | {"pretrained": str(out.resolve() / "vision.safetensors")}
    for key, value in changes.items():
        set_value(node, key, value)
    with new_folder(out) as folder:
        save_tensors(own, folder / "vision.safetensors")
        write_options(folder / "conf", {"encoder/vision": node})
    taken = node["architecture"]["quick_gelu"]
    note = f"taken for {'QuickGELU' if taken else 'GELU'}, the file does not say it: --set architecture.quick_gelu=BOOL"
    said = Row("said", "activation", 0, 0, note)
    return [*grouped("mapped", own, lambda _: "image encoder"), *rows, said], "encoder/vision=imported"


def import_text(source: Source, out: Path, tokenizer: str | None, changes: Mapping[str, Any]) -> tuple[list[Row], str]:
    """The trunk of a RoBERTa or BERT."""
    kinds = {key.split(".")[0] for key in source.tensors} & {"roberta", "bert"}
    prefix = f"{kinds.pop()}." if kinds else ""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in source.tensors.items()}
    rest, rows = _rest(tensors, TEXT_REST, "")
    own = {key: tensor for key, tensor in tensors.items() if key not in rest}
    settings = source.settings | ({"model_type": prefix.removesuffix(".")} if prefix else {})
    if settings.get("model_type") not in (None, "roberta", "bert"):
        raise CheckpointError(f"{source.path}: a {settings['model_type']}; RoBERTa and BERT are read")
    node = text_node(own, settings, "")
    for key, value in changes.items():
        set_value(node, key, value)
    found = find_tokenizer(tokenizer, source.folder)
    check_tokenizer(found, node["config"]["vocab_size"])
    with new_folder(out) as folder:
        place = folder / "text"
        place.mkdir()
        save_tensors(own, place / "model.safetensors", {"format": "pt"})
        kind = {"roberta": "RobertaModel", "bert": "BertModel"}[node["config"]["model_type"]]
        (place / "config.json").write_text(json.dumps(node["config"] | {"architectures": [kind]}, indent=1) + "\n")
        named: dict[str, Any] = node["tokenizer"]
        if found is not None:
            found.save(place / "tokenizer.json")
            roles = token_roles(found) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            (place / "tokenizer_config.json").write_text(json.dumps(roles, indent=1) + "\n")
            named = {"kind": "pretrained", "name": str(out.resolve() / "text")}
        node |= {"name": str(out.resolve() / "text"), "pretrained": True, "config": None, "tokenizer": named}
        write_options(folder / "conf", {"encoder/text": node})
    mapped = grouped("mapped", own, lambda _: "text encoder")
    return [*mapped, *rows], "encoder/text=imported"


def _rest(tensors: dict[str, Tensor], table: tuple, other: str) -> tuple[dict[str, Tensor], list[Row]]:
    """What the encoder does not read, with the reason of each."""
    rest: dict[str, Tensor] = {}
    rows: list[Row] = []
    for pattern, reason in table:
        found = {key: tensor for key, tensor in tensors.items() if key not in rest and re.fullmatch(pattern, key)}
        rest |= found
        rows += grouped("dropped", found, lambda key: key.split(".")[0], reason or other)
    return rest, rows
