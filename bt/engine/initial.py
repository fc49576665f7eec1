"""Starting from the weights of another run: what fits is taken, what does not is named."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bt.engine.checkpoint import (
    best_checkpoint,
    differences,
    last_checkpoint,
    listed,
    read_state,
    read_tensors,
    shapes,
)
from bt.errors import CheckpointError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass
class Loaded:
    """What a start from other weights did.

    source: the file read. reused: objectives whose heads were taken; started: "name from other" of heads that start
    from another objective's; new: objectives of this model that start new; unused: objectives of the checkpoint whose
    heads are neither taken nor started from.
    """

    source: Path
    encoders_only: bool = False
    reused: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"weights {'of the encoders ' if self.encoders_only else ''}from {self.source}"]
        parts += [f"{word}: {', '.join(names)}" for word, names in self._named() if names]
        return "; ".join(parts)

    def _named(self) -> list[tuple[str, list[str]]]:
        return [
            ("heads taken", self.reused),
            ("heads started", self.started),
            ("new heads", self.new),
            ("heads in the checkpoint that are not used", self.unused),
        ]


def weights_file(path: Path | str) -> Path:
    """The file with the weights that `path` means.

    A run directory stands for its best checkpoint, else its last; a checkpoint directory for its model.safetensors.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        checkpoint = best_checkpoint(path) or last_checkpoint(path) or path
        if not (checkpoint / "model.safetensors").is_file():
            raise CheckpointError(f"{path} is no run or checkpoint: it has neither checkpoints/ nor model.safetensors")
        return checkpoint / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix not in (".safetensors", *PICKLES):
        raise CheckpointError(f"{path} is not a checkpoint: its name must end in .safetensors, {', '.join(PICKLES)}")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file; a pickle is read without running anything that it holds."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, and code is never executed; `python -m bt.checkpoint "
            f"import {path} --out DIR` reads training checkpoints of other programs"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors")
    return content


def label_difference(source: Path, objective: nn.Module, labels: Mapping[str, list[str]]) -> str | None:
    """How the labels that a checkpoint's head was trained with differ from `labels`; None where they do not.

    Compared are the maps that the objective keeps as an attribute of their name (VQA.answers): a row of its head means
    one of them. A checkpoint that does not say what its labels were is taken at its word.
    """
    kept = read_state(source.parent).get("labels", {}) if source.with_name("state.json").is_file() else {}
    for name in labels:
        if not hasattr(objective, name) or name not in kept or list(kept[name]) == list(labels[name]):
            continue
        then, now = kept[name], labels[name]
        row = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), None)
        if row is None:
            return f"labels '{name}': the checkpoint has {len(then)}, the data {len(now)}"
        return f"labels '{name}': number {row} is {then[row]!r} in the checkpoint and {now[row]!r} in the data"
    return None


def load_weights(
    path: Path | str,
    model: nn.Module,
    *,
    ignore_heads: bool = False,
    labels: Mapping[str, list[str]] | None = None,
    encoders_only: bool = False,
) -> Loaded:
    """Loads the tower, and the heads of the objectives that both have, into `model` (bt.tasks.base.TaskModel).

    The tower must fit after `BridgeTower.adapt_state` (image size, channels, token types); CheckpointError names the
    first keys and shapes that do not. A head with other shapes, or whose rows mean other `labels` (of the data) than
    when it was trained, is an error too, unless `ignore_heads`: then it starts new. No key is dropped silently.
    encoders_only: the two uni-modal encoders are loaded, whatever else the checkpoint holds; all else starts new.
    """
    source = weights_file(path)
    state = read_weights(source)
    tower = {key.removeprefix("tower."): value for key, value in state.items() if key.startswith("tower.")}
    heads: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("objectives."):
            _, name, own = key.split(".", 2)
            heads.setdefault(name, {})[own] = value
    foreign = [key for key in state if not key.startswith(("tower.", "objectives."))]
    if foreign or not tower:
        raise CheckpointError(
            f"{source} is not a checkpoint of bt: its keys start with 'tower.' or 'objectives.', but here is "
            f"{foreign[0] if foreign else 'no tower'}; `python -m bt.checkpoint import {source} --out DIR` reads those "
            "of other programs"
        )
    own = model.tower.state_dict()
    if encoders_only:
        tower, own, heads = _encoders(tower), _encoders(own), {}
    tower = model.tower.adapt_state(tower)
    lines = differences(shapes(tower), shapes(own))
    if lines:
        raise CheckpointError(f"{source} holds another architecture: {listed([f'tower.{line}' for line in lines])}")
    report = Loaded(source, encoders_only, unused=[name for name in heads if name not in model.objectives])
    fitting: dict[str, Tensor] = {}
    for name, objective in model.objectives.items():
        lines = differences(shapes(heads[name]), shapes(objective.state_dict())) if name in heads else []
        misfit = f"objectives.{name}.{lines[0]}" if lines else None
        # The labels say more than the number of rows that follows from them.
        if name in heads and (other := label_difference(source, objective, labels or {})):
            misfit = other
        if misfit and not ignore_heads:
            raise CheckpointError(
                f"{source}: the head of {name} does not fit: {misfit}; training with checkpoint.ignore_heads=true "
                "starts it new"
            )
        if name in heads and not misfit:
            report.reused.append(name)
            fitting |= {f"objectives.{name}.{key}": value for key, value in heads[name].items()}
        elif start := objective.start_from(heads):
            other, tensors = start
            report.started.append(f"{name} from {other}")
            report.unused = [head for head in report.unused if head != other]
            fitting |= {f"objectives.{name}.{key}": value for key, value in tensors.items()}
        elif objective.state_dict():
            report.new.append(name)
    model.tower.load_state_dict(tower, strict=not encoders_only)
    model.load_state_dict(fitting, strict=False)
    return report


def _encoders(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tower.items() if key.startswith(("vision.", "text."))}
