"""Reading other programs' checkpoints: what it is, what becomes of every tensor, and what the model is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt.data.text import Tokenizer, load_tokenizer, pretrained_tokenizer
from bt.engine.checkpoint import differences, listed, shapes
from bt.errors import CheckpointError, ConfigError, DataError
from bt.interop import architecture
from bt.interop.folder import LABELS_OF, RELEASED_CLASSES, Bundle, all_labels, build, label_rows
from bt.interop.huggingface import from_huggingface, unused_huggingface
from bt.interop.managertower import from_managertower, unused_managertower
from bt.interop.official import from_official, unused, why_unused
from bt.interop.record import check_values, place, restore_record
from bt.interop.source import TOKENIZER_FILES, Source, drop, read_json
from bt.models.encoders.base import CLIP_MEAN, CLIP_STD
from bt.tasks.base import TaskModel

# What a file is, by a tensor that it has; the first that fits.
FAMILIES = (
    ("bt", r"tower\..+"),
    ("transformers", r"(bridgetower\.)?vision_model\.visual\.embeddings\.patch_embedding\.weight"),
    ("managertower", r"cross_modal_text_manager_tower\.0\..+"),
    ("bridgetower", r"cross_modal_text_layernorm\.weight"),
    ("meter_fusion", r"text_gate\.weight"),
    ("meter", r"cross_modal_text_layers\.0\..+"),
    ("clip", r"(module\.)?visual\.conv1\.weight"),
    ("clip_of_transformers", r"(vision_model\.)?embeddings\.patch_embedding\.weight"),
    ("text", r"((roberta|bert)\.)?embeddings\.word_embeddings\.weight"),
)
RELEASED = {
    "bridgetower": ("BridgeTower, released code", "bt.models.bridges.add.AddBridge", {"norm_eps": 1e-5}),
    "meter": ("METER", "bt.models.bridges.none.NoBridge", {}),
    "meter_fusion": ("METER with the fusion of all layers", "bt.models.bridges.meter_fusion.MeterFusionBridge", {}),
    "managertower": ("ManagerTower, released code", "", {}),
}
# What the report calls the tensors whose own names start so.
PARTS = (
    (r"tower\.vision\.", "image encoder"),
    (r"tower\.text\.", "text encoder"),
    (r"tower\.\w+_projection\.|tower\.type_embeddings\.", "projections, token types"),
    (r"tower\.\w+_bridge\.", "bridges"),
    (r"tower\.cross\.", "cross-modal layers"),
    (r"tower\.\w+_pooler\.", "poolers"),
    (r"objectives\.(\w+)\.", "head {}"),
)


@dataclass(frozen=True)
class Row:
    """A line of the report. what: mapped, kept (in unused.safetensors), dropped, new, said."""

    what: str
    part: str
    tensors: int
    values: int
    note: str = ""


def family_of(tensors: Mapping[str, Tensor]) -> str:
    for family, pattern in FAMILIES:
        if any(re.fullmatch(pattern, key) for key in tensors):
            return family
    shown = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(
        f"none of the known formats: neither BridgeTower, METER or ManagerTower nor CLIP or RoBERTa (it has {shown})"
    )


def import_source(
    source: Source,
    *,
    tokenizer: str | None = None,
    labels: Mapping[str, list[str]] | None = None,
    leave_out: Sequence[str] = (),
    dropped: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    digest: bool = False,
) -> tuple[Bundle, list[Row]]:
    """A whole model of another program, and the report on every tensor of it; see bt.interop.source.open_source.

    tokenizer: a folder or name; without it the one beside the weights. labels: maps that the source lacks. leave_out:
    heads. dropped: patterns of tensors that have no counterpart here and shall have none. changes: values of the
    configuration, by dotted key, which the source does not say. Raises CheckpointError for tensors that nothing
    explains, and for a model that does not fit them.
    """
    family = family_of(source.tensors)
    if family not in ("transformers", *RELEASED):
        raise CheckpointError(f"{source.path} {_not_a_model(family)}")
    tensors, thrown = drop(source.tensors, list(dropped))
    notes: list[Row] = []
    if family == "transformers":
        state, rest, nodes, title = _from_transformers(source, tensors, notes)
    else:
        state, rest, nodes, title = _from_released(family, source, tensors)
    check_values(nodes, source.path)
    nodes |= {"plugins": []}
    for key, value in (changes or {}).items():
        set_value(nodes, key, value)
    restore_record(nodes, state, source.record)
    origin = {"format": family, "file": source.path.name, "settings": source.settings, "bare": _is_bare(tensors)}
    if digest:
        origin["sha256"] = sha256(source.path)
    bundle = Bundle(nodes, state, rest | thrown, origin=origin, source=f"{title} {source.path}")
    bundle.labels = _labels(bundle, source.record.get("labels", {}), labels or {})
    bundle.tokenizer = find_tokenizer(tokenizer, source.folder)
    rows = nodes["encoder"]["text"]["config"]["vocab_size"]
    check_tokenizer(bundle.tokenizer, rows)
    # Without a tokenizer at hand the configuration names the one that has as many ids.
    nodes["encoder"]["text"]["tokenizer"] = architecture.tokenizer_node(rows, kept=bundle.tokenizer is not None)
    bundle.leave_out(list(leave_out))
    check(bundle)
    return bundle, [*_rows(bundle, thrown, source, leave_out), *notes]


def _not_a_model(family: str) -> str:
    return {
        "bt": "has bt's own tensors already",
        "clip": "has CLIP's weights, an encoder's alone",
        "clip_of_transformers": (
            "has CLIP's weights by transformers' names; open_clip's or OpenAI's own file of the same model is read"
        ),
        "text": "has a text encoder's weights alone",
    }[family]


def _is_bare(tensors: Mapping[str, Tensor]) -> bool:
    return not any(key.startswith("bridgetower.") for key in tensors)


def _from_released(
    family: str, source: Source, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], str]:
    title, target, options = RELEASED[family]
    if "vit_model.visual.conv1.weight" not in tensors:
        raise CheckpointError(f"{source.path}: its image encoder is no CLIP ViT, and no other is read")
    if family == "managertower":
        state = from_managertower(tensors)
        rest = unused_managertower(tensors) | _no_contrast(state, tensors)
        bridge = architecture.manager_node(state, source.settings)
    else:
        state = from_official(tensors)
        rest = unused(tensors) | _no_contrast(state, tensors)
        bridge = {"_target_": target, **options}
    return state, rest, architecture.released_nodes(state, bridge, source.settings), title


def _from_transformers(
    source: Source, tensors: Mapping[str, Tensor], notes: list[Row]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], str]:
    from transformers import BridgeTowerConfig  # slow to import

    if not source.settings:
        raise CheckpointError(f"{source.path} has no config.json beside it, which says what its tensors do not")
    try:
        config = BridgeTowerConfig(**source.settings).to_dict()
    except Exception as error:
        raise CheckpointError(f"{source.path.parent}/config.json: {' '.join(str(error).split())[:200]}") from error
    tensors = dict(tensors)
    decoder, tied = "mlm_score.decoder.weight", f"{'' if _is_bare(tensors) else 'bridgetower.'}text_model.embeddings."
    if "mlm_score.bias" in tensors and decoder not in tensors and config["tie_word_embeddings"]:
        tensors[decoder] = tensors[f"{tied}word_embeddings.weight"]
        notes.append(Row("said", "head mlm", 1, 0, "its decoder is tied to the word table there; here a copy of it"))
    bias = tensors.get("mlm_score.decoder.bias")
    if bias is not None and not torch.equal(bias, tensors["mlm_score.bias"]):
        raise CheckpointError(
            f"{source.path}: mlm_score.decoder.bias and mlm_score.bias differ; transformers ties them"
        )
    state = from_huggingface(tensors)
    rest = unused_huggingface(tensors) | _no_contrast(state, tensors)
    nodes = architecture.transformers_nodes(state, config)
    notes += check_images(source, nodes["encoder"]["vision"]["image_size"])
    return state, rest, nodes, "BridgeTower of transformers"


def check_images(source: Source, image_size: int) -> list[Row]:
    """What the folder's image processor says of sizes, where the weights say another; CheckpointError where its pixels
    are not normalised as the image encoder's here."""
    found = source.processor
    for key, own in (("do_rescale", True), ("do_normalize", True), ("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        value = found.get(key, own)
        same = value is True if own is True else isinstance(value, list | tuple) and [*value] == [*own]
        if not same:
            raise CheckpointError(
                f"{source.folder}: its image processor has {key}={value}, the image encoder here takes {own}"
            )
    rows = []
    for key in ("size", "crop_size"):
        sides = found.get(key) or image_size
        sides = [*sides.values()] if isinstance(sides, dict) else [sides]
        if sides != [image_size] * len(sides):
            note = f"{key} is {found[key]} there; here it is {image_size}, as the weights' position table has it"
            rows.append(Row("said", "image processor", 0, 0, note))
    return rows


def _no_contrast(state: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The temperature, where there are no heads that it is for; it is taken out of `state`."""
    if any(key.startswith("objectives.itc.text_head") for key in state):
        # exp(-ln x) need not be x to the last bit, so the way back takes what was read.
        return {key: tensor for key, tensor in tensors.items() if key == "logit_scale" and key not in state}
    if state.pop("objectives.itc.temperature", None) is None:
        return {}
    return {key: tensors[key] for key in ("temperature", "logit_scale") if key in tensors}


def set_value(nodes: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key that is there, by its dotted name."""
    node, last = place(nodes, key)
    if last not in node:
        raise ConfigError(f"--set {key}: the model's configuration has no such key")
    node[last] = value


def _labels(bundle: Bundle, recorded: Mapping[str, Any], given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    heads = label_rows(bundle.state)
    labels = {kind: list(names) for kind, names in recorded.items()}
    for name in heads:
        kind = LABELS_OF[name]
        if name in RELEASED_CLASSES and heads[name] == len(RELEASED_CLASSES[name]):
            labels[kind] = RELEASED_CLASSES[name]
        for source in (recorded, given):
            if kind in source:
                labels[kind] = list(source[kind])
    return labels


def find_tokenizer(name: str | None, folder: Path | None) -> Tokenizer | None:
    """The tokenizer called `name` (a folder, a tokenizer.json, a name of the hub), else what lies in `folder`."""
    if name is not None:
        return load_tokenizer(name) if name.endswith(".json") else pretrained_tokenizer(name)
    if folder is None or not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return pretrained_tokenizer(str(folder))
    return load_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None


def token_roles(tokenizer: Tokenizer) -> dict[str, str]:
    """Its special tokens by transformers' names of their roles."""
    special = tokenizer.special
    return {
        "bos_token": special["bos"],
        "cls_token": special["bos"],
        "eos_token": special["eos"],
        "sep_token": special["eos"],
        "pad_token": special["pad"],
        "mask_token": special["mask"],
    }


def check_tokenizer(tokenizer: Tokenizer | None, rows: int) -> None:
    """The ids must be those of the weights' word table."""
    if tokenizer is not None and tokenizer.vocab_size != rows:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the word table {rows} rows: it is another model's"
        )


def check(bundle: Bundle) -> TaskModel:
    """The model that the configuration describes, on "meta"; CheckpointError unless the tensors are exactly its."""
    all_labels(bundle)
    try:
        model = build(bundle, "meta")
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{bundle.source}: {error}") from error
    lines = differences(shapes(bundle.state), shapes(model.state_dict()))
    if lines:
        raise CheckpointError(f"{bundle.source} has not the tensors of its architecture: {listed(lines)}")
    return model


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(key: str) -> str:
    for pattern, part in PARTS:
        if match := re.match(pattern, key):
            return part.format(*match.groups())
    return key


def grouped(what: str, tensors: Mapping[str, Tensor], name: Callable[[str], str], note: str = "") -> list[Row]:
    """A row for each part of `tensors`."""
    parts: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        parts.setdefault(name(key), []).append(tensor)
    return [Row(what, part, len(found), sum(t.numel() for t in found), note) for part, found in parts.items()]


def _rows(bundle: Bundle, thrown: Mapping[str, Tensor], source: Source, left: Sequence[str]) -> list[Row]:
    mapped = dict(sorted(bundle.state.items(), key=lambda item: _order(item[0])))
    rows = grouped("mapped", mapped, part_of)
    for key, tensor in bundle.unused.items():
        if key in thrown:
            continue
        rows.append(Row("kept", key, 1, tensor.numel(), why_unused(key) or _why_kept(key)))
    rows += grouped("kept", thrown, str, "as asked by --drop")
    rows += [Row("dropped", f"head {name}", 0, 0, "as asked by --leave-out") for name in left]
    if source.training:
        rows.append(Row("dropped", ", ".join(source.training), 0, 0, "state of the other program's training"))
    text = bundle.nodes["encoder"]["text"]["config"]
    if bundle.origin["format"] in RELEASED and text["vocab_size"] not in architecture.VOCABULARIES:
        note = (
            f"{text['num_attention_heads']} heads taken for granted; encoder.text.config.num_attention_heads by --set"
        )
        rows.append(Row("said", "text encoder", 0, 0, note))
    return rows


def _why_kept(key: str) -> str:
    if key in ("temperature", "logit_scale"):
        return "temperature of the contrastive loss, to the last bit of the other program's"
    if key.startswith("layer_embeddings_"):
        return "rows of layers below the managed ones, which are never read"
    return "registered by the other program, never used"


def _order(key: str) -> int:
    return next((number for number, (pattern, _) in enumerate(PARTS) if re.match(pattern, key)), len(PARTS))


def read_labels(path: Path) -> dict[str, list[str]]:
    """Label maps from shards (their index.json) or a JSON file {"answers": [...]}."""
    content = read_json(path / "index.json" if path.is_dir() else path)
    maps = content.get("labels", content)
    found = {kind: maps[kind] for kind in set(LABELS_OF.values()) if isinstance(maps.get(kind), list)}
    if not found:
        raise CheckpointError(f"{path} has no label map: {', '.join(sorted(set(LABELS_OF.values())))}")
    return found


def as_value(text: str) -> Any:
    """A value of the command line: JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
