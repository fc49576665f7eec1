"""Checkpoints of other programs, read without running anything that they hold.

torch's weights-only reader refuses every class that it does not know. A training checkpoint often names some beside
its tensors (command-line options, callbacks, configuration objects): they become inert `Placeholder`s here, which keep
what was said of them and do nothing. A class whose module is blocked by torch (os, sys) is refused even so.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt.errors import CheckpointError
from bt.models.encoders.open_clip_vit import is_torchscript

# Subclasses of plain containers, which keep their content as such.
CONTAINERS = {
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "lightning.pytorch.utilities.parsing.AttributeDict": dict,
    "sacred.config.custom_containers.ReadOnlyDict": dict,
    "sacred.config.custom_containers.ReadOnlyList": list,
    "sacred.config.custom_containers.DogmaticDict": dict,
    "sacred.config.custom_containers.DogmaticList": list,
}


STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Placeholder:
    """Stands for an object of a class that is not known here; `state` and `arguments` are what the file says of it."""

    def __init__(self, *arguments: Any, **named: Any):
        self.arguments = arguments
        self.state: Any = named

    def __setstate__(self, state: Any) -> None:
        self.state = state


def placeholder(name: str) -> type:
    """A class of its own for each name, since one can be a key of a dictionary."""
    # Made by NEWOBJ it would have no attributes.
    members = {"__module__": __name__, "arguments": (), "state": None}
    return type(name.rpartition(".")[2], (Placeholder,), members)


def read_pickle(path: Path) -> Any:
    """What a .ckpt, .pt, .pth or .bin holds, tensors on the CPU, as views of the file where that is possible."""
    _check_kind(path)
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        # Objects that torch has to be told of; the file's own code is not run to find them.
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipfile.is_zipfile(path) else []
        known = [(CONTAINERS.get(name) or placeholder(name), name) for name in unknown]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(refusal(path, error)) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def _check_kind(path: Path) -> None:
    """Of other files torch says what no user can read: a number, or that the file may not be trusted."""
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if first != pickle.PROTO and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is no checkpoint: neither a zip archive nor a pickle, as torch writes them")


def refusal(path: Path, error: Exception) -> str:
    # torch's text has an introduction about turning the protection off, which is no advice for a file of others.
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Can only" in line]
    reason = lines[0] if lines else str(error).splitlines()[0]
    return (
        f"{path} is refused: it holds more than tensors and plain values, and code is never executed ({reason}). If "
        f"you trust it, open it where the program that wrote it is installed and keep its tensors alone: "
        f"torch.save({{'state_dict': torch.load('{path}', weights_only=False)['state_dict']}}, 'tensors.ckpt')"
    )


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The state dict of a TorchScript archive: its data alone, none of its code."""
    try:
        archive = torch.PyTorchFileReader(str(path))
        return tensors_of(_Data(archive).load())
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a TorchScript archive: {reason}") from error


def tensors_of(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a Placeholder that stands for a module and of those below it, by the names of a state dict."""
    found: dict[str, Tensor] = {}
    state = module.state if isinstance(module, Placeholder) else None
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Placeholder):
            found |= tensors_of(value, f"{prefix}{name}.")
    return found


class _Call:
    """A function that a pickle may call: it has no attribute that could be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Any):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a function's attributes are not set")

    __setstate__ = None


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    # as_strided checks the bounds.
    return storage.as_strided(tuple(size), tuple(stride), int(offset))


class _Data(pickle.Unpickler):
    """data.pkl of a TorchScript archive: tensors, plain values, and placeholders for all else."""

    def __init__(self, archive: torch.PyTorchFileReader):
        content = archive.get_record("data.pkl")
        # Only what such archives are made of: no extension codes, no classes by other ways than find_class.
        for opcode, _, _ in pickletools.genops(content):
            if opcode.name.startswith("EXT") or opcode.name in ("INST", "OBJ"):
                raise pickle.UnpicklingError(f"unexpected instruction {opcode.name}")
        super().__init__(io.BytesIO(content))
        self.archive = archive
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Call(_tensor)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        return placeholder(f"{module}.{name}")

    def persistent_load(self, identity: tuple) -> Tensor:
        """A storage, as a tensor in one dimension; tensors that share it share it here."""
        _, kind, key, _, count = identity
        if key not in self.storages:
            content = bytearray(self.archive.get_record(f"data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=STORAGES[kind], count=int(count))
        return self.storages[key]
