"""Any model that can be read, ready to use: a run, an imported folder, transformers' folders, released files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bt.config import Config
from bt.data.text import Tokenizer, make_tokenizer
from bt.errors import ConfigError, DataError
from bt.interop.folder import Bundle, build, is_folder, read_folder, run_config
from bt.interop.imports import find_tokenizer, import_source
from bt.interop.source import open_source
from bt.tasks.base import TaskModel


@dataclass
class Loaded:
    """config: its encoder, bridge, cross, task.objectives, data.max_text_len and data.eval_transform hold; of a model
    that was not trained here the rest are defaults, and data.dir and task.metric mean nothing. model: fp32, on the CPU,
    in eval mode. tokenizer: None where there is none at hand. labels: as stored, {} where nobody knows them (the heads
    then have "answer 0", ...). source: what was read, for messages.
    """

    config: Config
    model: TaskModel
    tokenizer: Tokenizer | None
    labels: dict[str, list[str]]
    source: str


def open_bundle(
    path: str | Path,
    *,
    tokenizer: str | None = None,
    labels: Mapping[str, list[str]] | None = None,
    leave_out: Sequence[str] = (),
) -> Bundle:
    """The model that `path` names, its tensors not yet in a module; see `load_model`."""
    place = Path(path).expanduser()
    if place.name == "model.safetensors" and is_folder(place.parent):
        place = place.parent  # of a checkpoint, which says what it is
    if not is_folder(place):
        return import_source(open_source(path), tokenizer=tokenizer, labels=labels, leave_out=leave_out)[0]
    bundle = read_folder(place)
    if tokenizer is not None:
        bundle.tokenizer = find_tokenizer(tokenizer, None)
    bundle.labels = {**(labels or {}), **bundle.labels}
    bundle.leave_out(list(leave_out))
    return bundle


def load_model(
    path: str | Path,
    *,
    tokenizer: str | None = None,
    labels: Mapping[str, list[str]] | None = None,
    leave_out: Sequence[str] = (),
) -> Loaded:
    """The model that `path` names.

    path: a run directory (its best checkpoint, else its last), a checkpoint's directory, a folder that
    `python -m bt.checkpoint import` wrote, a folder of transformers or a name on its hub, or a released file.
    tokenizer: a folder, name or tokenizer.json, where the path has none. labels: label maps where it has none.
    leave_out: objectives that are not built. Raises a UserError.
    """
    bundle = open_bundle(path, tokenizer=tokenizer, labels=labels, leave_out=leave_out)
    if bundle.tokenizer is None:
        bundle.tokenizer = _named_tokenizer(bundle)
    with torch.random.fork_rng(devices=[]):  # new weights are drawn from the run's seed, and replaced at once
        model = build(bundle)
    model.load_state_dict(bundle.state)
    nodes = {key: node for key, node in bundle.nodes.items() if node}
    return Loaded(run_config(nodes), model.eval(), bundle.tokenizer, bundle.labels, bundle.source)


def _named_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer that the configuration names, where it is at hand."""
    node = bundle.nodes["encoder"]["text"]["tokenizer"]
    if node.get("kind") != "pretrained":
        return None
    try:
        return make_tokenizer(texts=(), **node)
    except (DataError, ConfigError):
        return None
