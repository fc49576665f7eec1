"""What an export of bt keeps beside another program's format, and the check that a file brings values and no code.

The record is bt.json in a folder, the entry `bt` of a .ckpt. Like all that a file of others holds it is not trusted:
of the configuration it may set the keys of RECORDED alone, each to a plain value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt.errors import CheckpointError

RECORD = "bt"
# The keys of the configuration that a record may set, and what their values are.
RECORDED: dict[str, type] = {
    "bridge.attend_padding": bool,
    "bridge.norm_eps": float,
    "cross.dropout": float,
    "cross.norm_eps": float,
    "data.eval_transform": str,
    "data.max_text_len": int,
    "encoder.text.config.layer_norm_eps": float,
    "encoder.text.config.num_attention_heads": int,
    "task.objectives.mlm.norm_eps": float,
}
# Where a configuration names a class; which one is chosen here and never by a file.
BUILT = re.compile(r"encoder\.(vision|text)|bridge|cross|task\.objectives\.\w+")


def read_record(content: Any, path: Path) -> dict[str, Any]:
    """`content`, if it is a record as an export writes it; CheckpointError that names the file where it is none.

    settings: dotted key -> [value here, what the target was given in its place]. labels: label maps. temperature: to
    the last bit.
    """

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: no record of bt's export: {what}")

    need(isinstance(content, dict), "it is no object")
    settings, labels, temperature = content.get("settings", {}), content.get("labels", {}), content.get("temperature")
    need(isinstance(settings, dict), "its settings are no object")
    for key, pair in settings.items():
        if key not in RECORDED:
            raise CheckpointError(f"{path}: its record sets {key}, which no export of bt writes")
        kind = RECORDED[key]
        two = isinstance(pair, list) and len(pair) == 2
        need(two and all(_is(value, kind) for value in pair), f"{key} is no list of two {kind.__name__}")
    need(isinstance(labels, dict) and all(map(_are_names, labels.values())), "its labels are no lists of strings")
    good = temperature is None or (_is(temperature, float) and math.isfinite(temperature) and temperature > 0)
    need(good, "its temperature is no number above 0")
    return content


def _is(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str) and "${" not in value
    return type(value) in ((int, float) if kind is float else (kind,))


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def restore_record(nodes: dict[str, Any], state: dict[str, Tensor], record: Mapping[str, Any]) -> None:
    """What a record says, where the source still holds what was written then."""
    for key, (value, written) in record.get("settings", {}).items():
        node, last = place(nodes, key)
        if node.get(last) == written:
            node[last] = value
    name, exact = "objectives.itc.temperature", record.get("temperature")
    if exact is not None and name in state and abs(state[name].item() - exact) < 1e-6 * exact:
        state[name] = torch.tensor(exact, dtype=state[name].dtype)


def place(nodes: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The dictionary that a dotted key ends in, an empty one where there is none, and the key's last part."""
    *path, last = key.split(".")
    node: Any = nodes
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}, last


def check_values(node: Mapping[str, Any], path: Path, where: str = "") -> None:
    """Raises CheckpointError unless a configuration made from the settings of `path` has plain values alone.

    A `_target_` would be called when the model is built, and so would the resolvers of an interpolation.
    """
    for key, value in node.items():
        name = f"{where}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            check_values(value, path, name)
            continue
        plain = value is None or isinstance(value, int | float) or (isinstance(value, str) and "${" not in value)
        if not plain or (key == "_target_" and not BUILT.fullmatch(where)):
            raise CheckpointError(f"{path}: its settings give {name}={value!r}, which is no plain value")
