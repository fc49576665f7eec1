"""Checkpoints: safetensors and JSON, complete or not there at all.

<run_dir>/checkpoints/step-%08d/ {model.safetensors, optimizer.safetensors, state.json, tokenizer.json}, and the
symbolic links `last` and `best` beside them. What is read is never executed: safetensors hold no code, and pickles
of other programs are opened by torch's weights-only reader.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bt.engine.optimizer import AdamW
from bt.engine.parallel import like, local, whole
from bt.errors import CheckpointError

DIRECTORY = "checkpoints"
_TEMPORARY = ".saving-"


def save(
    run_dir: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    best: bool = False,
    tokenizer: Path | None = None,
    keep: int = 1,
) -> Path:
    """Writes the checkpoint of `step` and points `last` (and `best`) at it; then all but the last `keep` are removed.

    tensors: by file ("model", "optimizer") and name, as `contents` gives them; may be empty where this step is `last`
    or `best` already. state: whatever else must be known to go on, as JSON values (best metric, tracking run, loss
    scaler, config). tokenizer: a tokenizer.json that the weights cannot be used without. Only one rank may call this.
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
            _check_space(root, tensors)
            temporary.mkdir()
            for name, named in tensors.items():
                save_tensors(named, temporary / f"{name}.safetensors")
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
    _prune(root, keep)
    return final


def contents(model: nn.Module, optimizer: AdamW) -> dict[str, Iterator[tuple[str, Tensor]]]:
    """What a checkpoint holds of both, by file: (name, whole tensor) in turn, where they are in memory.

    Every rank must go through all of them, in this order: sharded tensors are gathered one by one, on all ranks.
    """
    parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    return {file: ((name, whole(tensor.detach())) for name, tensor in named.items()) for file, named in parts.items()}


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
    """Loads weights and optimizer exactly as they were saved, and returns what `save` got as `state`, with `step`.

    Model and optimizer may be sharded, whatever they were when the checkpoint was written, and on however many ranks.
    """
    checkpoint = Path(checkpoint)
    state = read_state(checkpoint)
    load_model(checkpoint / "model.safetensors", model)
    load_optimizer(optimizer, checkpoint / "optimizer.safetensors")
    return state


def load_model(path: Path, model: nn.Module) -> None:
    """Loads the weights of a run of the same architecture, tensor by tensor, into a model that may be sharded."""
    own = model.state_dict()
    with opened(path) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.offset_keys()}
        _refuse_differences(path, found, shapes(own))
        for key, tensor in own.items():
            local(tensor).copy_(local(like(file.get_tensor(key), tensor)))


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


def load_optimizer(optimizer: AdamW, path: Path) -> None:
    """The inverse of `optimizer_tensors`, from a file; rates and decay stay as the configuration says."""
    packed = optimizer.state_dict()
    index = {
        name: (number, parameter)
        for group, own in zip(packed["param_groups"], optimizer.param_groups, strict=True)
        for name, number, parameter in zip(group["param_names"], group["params"], own["params"], strict=True)
    }
    states: dict[int, dict[str, Tensor]] = {}
    with opened(path) as file:
        steps = int(file.get_tensor("steps"))
        for entry in file.offset_keys():
            if entry == "steps":
                continue
            name, key = entry.rsplit("|", 1)
            if name not in index:
                raise CheckpointError(f"optimizer state of {name}, which this model does not train")
            number, parameter = index[name]
            tensor = file.get_tensor(entry)
            states.setdefault(number, {})[key] = like(tensor, parameter) if tensor.dim() == parameter.dim() else tensor
    for group in packed["param_groups"]:
        group["steps"] = steps
    optimizer.load_state_dict({"state": states, "param_groups": packed["param_groups"]})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A *.safetensors file, of which tensors are read one at a time, on the CPU."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a *.safetensors file, on the CPU."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.offset_keys()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def differences(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """ "key: has (3, 4), needs (5, 4)" for every key whose shapes are not the same in both."""
    return [
        f"{key}: has {found.get(key, 'nothing')}, needs {wanted.get(key, 'nothing')}"
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]


def listed(lines: Sequence[str]) -> str:
    """The first of some differences, and how many more there are."""
    more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
    return "; ".join(lines[:4]) + more


def _refuse_differences(where: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]):
    lines = differences(found, wanted)
    if lines:
        raise CheckpointError(f"{where} holds another architecture: {listed(lines)}")


def _check_space(root: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises OSError where the disk has no room for them, before anything is written."""
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"No space left: {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB free")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a *.safetensors file, for whom its directory is for, and waits until it is on the disk."""
    seen: set[tuple[int, int]] = set()
    plain = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        # safetensors has no two names for one storage.
        place = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        plain[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    save_file(plain, path, metadata)
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


def _prune(root: Path, keep: int) -> None:
    last, best = _target(root, "last"), _target(root, "best")
    steps = sorted(path for path in root.glob("step-*") if path <= last)
    kept = {*steps[-keep:], best}
    for path in root.iterdir():
        if (path.name.startswith("step-") and path not in kept) or path.name.startswith(_TEMPORARY):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
