"""A model with all that is known of it, and the folder that stands for it.

DIR/ {config.yaml, model.safetensors, state.json, conf/, and where there is such, tokenizer.json, unused.safetensors}.
The folder can be used like a run directory (bt.evaluate run_dir=DIR data=...) and as init_from=DIR; `conf` has its
encoder, bridge, cross and task as options of the groups, for --config-dir. unused.safetensors keeps what the other
program wrote and this model does not use, under the released names.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from bt.assemble import build_model
from bt.config import Config
from bt.config.record import read_recorded, to_config
from bt.config.targets import add_plugins
from bt.data.text import Tokenizer, load_tokenizer
from bt.engine.checkpoint import read_state, read_tensors, save_tensors
from bt.engine.initial import weights_file
from bt.errors import CheckpointError
from bt.tasks.base import TaskModel

NODES = ("encoder", "bridge", "cross", "task", "data")
DATA_OF_MODEL = ("max_text_len", "eval_transform", "resize", "decode_draft")  # how its inputs are prepared
OPTION = "imported"


@dataclass
class Bundle:
    """nodes: the parts NODES of a configuration, and `plugins`. state: tensors under own names. unused: tensors that
    the model does not use, under released names. labels: label maps by name. origin: where it came from, as JSON
    values; {} for models trained here. source: for messages."""

    nodes: dict[str, Any]
    state: dict[str, Tensor]
    unused: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    source: str = ""

    def objectives(self) -> list[str]:
        return list(self.nodes["task"]["objectives"])

    def leave_out(self, names: list[str]) -> None:
        """Removes objectives with their heads."""
        for name in names:
            if name not in self.objectives():
                raise CheckpointError(f"there is no head {name} to leave out: {', '.join(self.objectives()) or 'none'}")
            del self.nodes["task"]["objectives"][name]
            self.state = {k: v for k, v in self.state.items() if not k.startswith(f"objectives.{name}.")}
            if name == "nlvr2":
                # Nothing else reads the type of a second image.
                self.state["tower.type_embeddings.weight"] = self.state["tower.type_embeddings.weight"][:2]


@dataclass(frozen=True)
class Vocabulary:
    """What a model is built from in place of a tokenizer, where there is none at hand."""

    vocab_size: int
    pad_id: int
    mask_id: int = 0
    special_ids: tuple[int, ...] = ()


def is_folder(path: Path) -> bool:
    """Whether `path` is a run, one of its checkpoints, or an imported model."""
    return path.is_dir() and (
        (path / "config.yaml").is_file() or ((path / "state.json").is_file() and (path / "model.safetensors").is_file())
    )


def read_folder(path: Path) -> Bundle:
    """A run directory (its best checkpoint, else its last), one of its checkpoints, or an imported folder."""
    weights = weights_file(path)
    place = weights.parent
    config_dir = next((p for p in (place, place.parent.parent, path) if (p / "config.yaml").is_file()), None)
    if config_dir is None:
        raise CheckpointError(f"{path} has no config.yaml that says what its weights are")
    recorded = read_recorded(config_dir)
    state = read_state(place)
    unused = place / "unused.safetensors"
    tokenizer = next((p for p in (place, config_dir) if (p / "tokenizer.json").is_file()), None)
    imported = "origin" in state
    return Bundle(
        nodes={key: recorded.get(key, {}) for key in (*NODES, "plugins")},
        state=read_tensors(weights),
        unused=read_tensors(unused) if unused.is_file() else {},
        labels=state.get("labels", {}),
        origin=state.get("origin", {}),
        tokenizer=load_tokenizer(tokenizer / "tokenizer.json") if tokenizer else None,
        source=f"imported model {path}" if imported else f"run {config_dir}, step {state.get('step', '?')}",
    )


def write_folder(bundle: Bundle, out: Path) -> None:
    """Writes the folder of a model that was read from elsewhere; whole or not at all."""
    with new_folder(out) as folder:
        nodes = {key: bundle.nodes[key] for key in NODES}
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"name": OPTION, **nodes})))
        write_options(folder / "conf", {key: nodes[key] for key in ("encoder", "bridge", "cross", "task")})
        state = {"step": 0, "labels": bundle.labels, "origin": bundle.origin}
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        if bundle.tokenizer is not None:
            bundle.tokenizer.save(folder / "tokenizer.json")
        save_tensors(bundle.state, folder / "model.safetensors")
        if bundle.unused:
            save_tensors(bundle.unused, folder / "unused.safetensors")


def write_options(conf: Path, nodes: Mapping[str, Any]) -> None:
    """conf/GROUP/imported.yaml for each group."""
    for group, node in nodes.items():
        (conf / group).mkdir(parents=True)
        (conf / group / f"{OPTION}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node)))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all is written. Raises CheckpointError where `out` exists or cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already: give another --out")
    temporary = out.parent / f".writing-{out.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_config(nodes: Mapping[str, Any]) -> Config:
    """The nodes with every other option's default, as a configuration to build a model from."""
    given = {"data": {"dir": "-"}, "task": {"metric": "-"}}
    # Where a run's data was is no matter to its model, and may be a variable that is not set here.
    nodes = {**nodes, "data": {key: value for key, value in nodes.get("data", {}).items() if key in DATA_OF_MODEL}}
    node = OmegaConf.merge(OmegaConf.structured(Config), given, OmegaConf.create(nodes))
    return to_config(node)


def build(bundle: Bundle, device: str = "cpu") -> TaskModel:
    """The model without its weights; on "meta" it takes no memory and can only be compared with them."""
    add_plugins(bundle.nodes.get("plugins") or [])
    cfg = run_config({key: bundle.nodes[key] for key in NODES})
    tokenizer = bundle.tokenizer or vocabulary(bundle)
    with torch.device(device):
        return build_model(cfg, tokenizer, all_labels(bundle), pretrained=False)


def vocabulary(bundle: Bundle) -> Vocabulary:
    text = bundle.nodes["encoder"]["text"].get("config") or {}
    rows = text.get("vocab_size") or len(word_table(bundle.state))
    return Vocabulary(rows, text.get("pad_token_id", 1))


def word_table(state: Mapping[str, Tensor]) -> Tensor:
    return next(t for key, t in state.items() if key.startswith("tower.text.") and "word_embeddings" in key)


# The classes of the released heads, in the order of their rows (official write_nlvr2.py, write_snli.py).
RELEASED_CLASSES = {"nlvr2": ["False", "True"], "snli_ve": ["contradiction", "neutral", "entailment"]}
LABELS_OF = {"vqa": "answers", "nlvr2": "classes", "snli_ve": "classes"}


def label_rows(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many labels each head has, by objective."""
    ends = {name: (f"objectives.{name}.head.3.bias", f"objectives.{name}.head.0.bias") for name in LABELS_OF}
    return {
        name: len(next(state[key] for key in keys if key in state))
        for name, keys in ends.items()
        if any(key in state for key in keys)
    }


def all_labels(bundle: Bundle) -> dict[str, list[str]]:
    """The label maps, and where one is not known one that says the row ("answer 0"). Raises CheckpointError where the
    heads do not have as many rows."""
    labels = dict(bundle.labels)
    for name, rows in label_rows(bundle.state).items():
        kind = LABELS_OF[name]
        if kind not in labels:
            labels[kind] = [f"{kind.removesuffix('s').removesuffix('e')} {row}" for row in range(rows)]
        if len(labels[kind]) != rows:
            raise CheckpointError(
                f"the head {name} has {rows} rows, the labels '{kind}' are {len(labels[kind])}: give others by "
                f"--labels, or leave the head out by --leave-out {name}"
            )
    return labels
