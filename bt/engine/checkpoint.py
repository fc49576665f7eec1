"""Checkpoints: safetensors and JSON, complete or not there at all.

<run_dir>/checkpoints/step-%08d/ {model.safetensors, optimizer.safetensors, state.json, tokenizer.json}, and the
symbolic links `last` and `best` beside them. What is read is never executed: safetensors hold no code, and pickles
of other programs are opened by torch's weights-only reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bt.engine.optimizer import AdamW
from bt.errors import CheckpointError

DIRECTORY = "checkpoints"
_TEMPORARY = ".saving-"


def save(
    run_dir: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: AdamW,
    state: Mapping[str, Any],
    best: bool = False,
    tokenizer: Path | None = None,
) -> Path:
    """Writes the checkpoint of `step` and points `last` (and `best`) at it; then older ones are removed.

    state: whatever else must be known to go on, as JSON values (best metric, tracking run, loss scaler, config).
    tokenizer: a tokenizer.json that the weights cannot be used without. Only one rank may call this.
    Returns the checkpoint's directory. Raises CheckpointError where it cannot be written (a full disk): the previous
    checkpoint is untouched then.
    """
    root = Path(run_dir) / DIRECTORY
    final = root / f"step-{step:08d}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    content = json.dumps({"step": step, **state}, indent=1)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if final in (_target(root, "last"), _target(root, "best")):
            # The same step again, such as an evaluation that found the checkpoint just saved to be the best.
            _write_text(final / "state.json", content)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir()
            _save_tensors(model.state_dict(), temporary / "model.safetensors")
            _save_tensors(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
            _write_text(temporary / "state.json", content)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, temporary / "tokenizer.json")
                _sync(temporary / "tokenizer.json")
            _sync(temporary)
            temporary.rename(final)
            _sync(root)
        # `best` first: the state behind `last` names the best step, so that link must never be ahead.
        for link in ("best", "last") if best else ("last",):
            _point(root, link, final.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept = _target(root, "last")
        before = f"{kept} is kept" if kept else "there was none before"
        raise CheckpointError(f"checkpoint of step {step} cannot be saved in {root}: {reason} ({before})") from error
    _prune(root)
    return final


def last_checkpoint(run_dir: Path) -> Path | None:
    """The directory that a run continues from, or None where it has not saved yet."""
    return _target(Path(run_dir) / DIRECTORY, "last")


def best_checkpoint(run_dir: Path) -> Path | None:
    return _target(Path(run_dir) / DIRECTORY, "best")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint directory, with `step`."""
    path = Path(checkpoint) / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def resume(checkpoint: Path, model: nn.Module, optimizer: AdamW) -> dict[str, Any]:
    """Loads weights and optimizer exactly as they were saved, and returns what `save` got as `state`, with `step`."""
    checkpoint = Path(checkpoint)
    state = read_state(checkpoint)
    weights = read_tensors(checkpoint / "model.safetensors")
    _refuse_differences(checkpoint, weights, model.state_dict())
    model.load_state_dict(weights)
    load_optimizer(optimizer, read_tensors(checkpoint / "optimizer.safetensors"))
    return state


def optimizer_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """{"<parameter name>|exp_avg": tensor, ..., "steps": number of steps}.

    Parameters that never had a gradient have no entry.
    """
    return {"steps": torch.tensor(optimizer.param_groups[0]["steps"])} | {
        f"{name}|{key}": torch.as_tensor(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; rates and decay stay as the configuration says."""
    tensors = dict(tensors)
    steps = int(tensors.pop("steps"))
    packed = optimizer.state_dict()
    for group in packed["param_groups"]:
        group["steps"] = steps
    index = {
        name: number
        for group in packed["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    states: dict[int, dict[str, Tensor]] = {}
    for entry, tensor in tensors.items():
        name, key = entry.rsplit("|", 1)
        if name not in index:
            raise CheckpointError(f"optimizer state of {name}, which this model does not train")
        states.setdefault(index[name], {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": packed["param_groups"]})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a *.safetensors file, on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """ "key: has (3, 4), needs (5, 4)" for every key whose shapes are not the same in both."""

    def shape(tensors: Mapping[str, Tensor], key: str) -> str:
        return str(tuple(tensors[key].shape)) if key in tensors else "nothing"

    return [
        f"{key}: has {shape(found, key)}, needs {shape(wanted, key)}"
        for key in dict.fromkeys([*wanted, *found])
        if shape(found, key) != shape(wanted, key)
    ]


def _refuse_differences(where: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str = ""):
    lines = differences(found, wanted)
    if lines:
        shown = "; ".join(prefix + line for line in lines[:4])
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise CheckpointError(f"{where} holds another architecture: {shown}{more}")


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    seen: set[tuple[int, int]] = set()
    plain = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        # safetensors has no two names for one storage.
        place = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        plain[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    save_file(plain, path)
    # safetensors makes files for their owner alone; a checkpoint is for whom its directory is for.
    path.chmod(path.parent.stat().st_mode & 0o666)
    _sync(path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    """Waits until the file's or directory's content is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _target(root: Path, link: str) -> Path | None:
    path = root / link
    return root / os.readlink(path) if path.is_symlink() and path.exists() else None


def _point(root: Path, link: str, name: str) -> None:
    """Switches a symbolic link in one step: readers see the old target or the new one."""
    temporary = root / f".{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(root / link)
    _sync(root)


def _prune(root: Path) -> None:
    kept = {_target(root, "last"), _target(root, "best")}
    for path in root.iterdir():
        if (path.name.startswith("step-") and path not in kept) or path.name.startswith(_TEMPORARY):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
