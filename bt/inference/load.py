"""Where trained models come from. The one place that knows what a path can mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bt.assemble import build_model, tokenizer_of
from bt.config import Config
from bt.config.entry import check_config
from bt.config.record import from_recorded
from bt.data.text import Tokenizer, make_tokenizer
from bt.engine.checkpoint import read_state
from bt.engine.initial import load_weights, weights_file
from bt.errors import CheckpointError

# What of a run's configuration belongs to its model; where data and results were is no matter here, and may not exist.
_OF_THE_MODEL = ("name", "seed", "plugins", "encoder", "bridge", "cross", "task")
_OF_THE_DATA = ("max_text_len", "eval_transform", "resize", "decode_draft")


@dataclass
class Loaded:
    """A trained model and what belongs to it.

    config: its parts encoder, bridge, cross, task, and of data max_text_len, eval_transform, resize and decode_draft
    hold. model: on the CPU, for evaluation. labels: label maps by name, in the order of the heads' rows. source: what
    was read, for messages.
    """

    config: Config
    model: torch.nn.Module
    tokenizer: Tokenizer
    labels: dict[str, list[str]]
    source: str


def load_model(path: Path | str) -> Loaded:
    """The model of a run directory (best, else last checkpoint), a checkpoint directory or its model.safetensors.

    Raises CheckpointError. A run's configuration names the classes that are built: load only runs that you trust.
    """
    weights = weights_file(path)
    if not weights.with_name("state.json").is_file():
        raise CheckpointError(f"{weights} has no state.json beside it, which says what model it is")
    state = read_state(weights.parent)
    config = _config(state.get("config") or {}, weights)
    if weights.with_name("tokenizer.json").is_file() or config.encoder.text["tokenizer"]["kind"] == "trained":
        tokenizer = tokenizer_of(weights)
    else:
        tokenizer = make_tokenizer(texts=(), **config.encoder.text["tokenizer"])
    labels = state.get("labels", {})
    with torch.random.fork_rng(devices=[]):  # new weights are drawn from the run's seed, and replaced at once
        model = build_model(config, tokenizer, labels, pretrained=False)
    loaded = load_weights(weights, model, labels=labels)
    if loaded.new:
        raise CheckpointError(f"{weights} has no trained head for {', '.join(loaded.new)}")
    return Loaded(config, model.eval(), tokenizer, labels, f"{path}, step {state.get('step', 'unknown')}")


def _config(stored: dict[str, Any], weights: Path) -> Config:
    kept = {key: stored[key] for key in _OF_THE_MODEL if key in stored}
    kept["data"] = {key: stored["data"][key] for key in _OF_THE_DATA if key in stored.get("data", {})}
    config = from_recorded({**kept, "data": {"dir": "none", **kept["data"]}}, f"the configuration of {weights.parent}")
    check_config(config)
    return config
