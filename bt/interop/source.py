"""What `import` is given: a file, a folder of transformers, or a name on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bt.engine.checkpoint import read_tensors
from bt.errors import CheckpointError
from bt.interop.pickles import read_pickle
from bt.interop.record import RECORD, read_record

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# What a folder of transformers can have, the first one wins.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Beside the weights: configuration, tokenizer, image processor.
SMALL_FILES = ("*.json", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


@dataclass
class Source:
    """path: of the file with the weights, or the first of them. tensors: by the names that they have there.

    settings: the folder's config.json, or the released code's configuration (Lightning's hyper-parameters); {} where
    there is none. training: other entries of a training checkpoint (optimizer, callbacks). record: what an export of bt
    says of the model. processor: what the folder says of its images. folder: where a tokenizer may be.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def open_source(what: str | Path) -> Source:
    """Reads a file, a folder, or a model of the hub by its name (from the cache, else from the network)."""
    path = Path(what).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(what)):
        return _folder(fetch(str(what)))
    raise CheckpointError(f"{what} does not exist")


def fetch(name: str) -> Path:
    """The folder with a model of the Hugging Face hub; HF_HUB_OFFLINE=1 keeps it off the network."""
    from huggingface_hub import snapshot_download  # only here: everything else is local

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        if not any((folder / weights).is_file() for weights in WEIGHTS):
            folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
        return folder
    except Exception as error:
        raise CheckpointError(
            f"{name} is neither a path nor in the cache, and cannot be fetched ({type(error).__name__}); fetch "
            f"config.json, model.safetensors or pytorch_model.bin, preprocessor_config.json and the tokenizer's files "
            f"from huggingface.co/{name} by hand into a folder, and give that folder in place of the name"
        ) from error


def _folder(folder: Path) -> Source:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no weights: looked for {', '.join(WEIGHTS)}")
    paths = [found]
    if found.suffix == ".json":
        index = read_json(found).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{found} has no weight_map")
        names = sorted(set(index.values()))
        if foreign := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{found} names a file outside its folder: {foreign[0]}")
        paths = [folder / name for name in names]
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_tensors(path) if path.suffix == ".safetensors" else _state(read_pickle(path), path)[0]
    return Source(paths[0], tensors, **_beside(folder))


def _file(path: Path) -> Source:
    folder = path.parent
    if path.suffix == ".safetensors":
        return Source(path, read_tensors(path), **_beside(folder))
    if path.suffix not in PICKLES:
        raise CheckpointError(f"{path}: its name must end in .safetensors, {', '.join(PICKLES)}")
    content = read_pickle(path)
    tensors, rest = _state(content, path)
    own = {"settings": _settings(rest), "record": read_record(rest.pop(RECORD, {}), path), "folder": folder}
    if path.suffix == ".bin":
        own = _beside(folder) | {name: value for name, value in own.items() if value}
    training = [name for name in rest if name not in ("hyper_parameters", "hparams_name", "pytorch-lightning_version")]
    return Source(path, tensors, training=training, **own)


def _beside(folder: Path) -> dict[str, Any]:
    """What of a Source lies beside the weights."""
    record, images = (folder / f"{name}.json" for name in (RECORD, "preprocessor_config"))
    return {
        "settings": _optional(folder / "config.json"),
        "record": read_record(_optional(record), record),
        "processor": _optional(images) or _optional(folder / "processor_config.json").get("image_processor") or {},
        "folder": folder,
    }


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _state(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of what a pickle holds, and the other entries of a training checkpoint."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of tensors")
    nested = next((name for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), None)
    state = content[nested] if nested else content
    tensors = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not tensors:
        raise CheckpointError(f"{path} holds no state dict of tensors: {', '.join(other[:3]) or 'it is empty'}")
    rest = {str(key): value for key, value in content.items() if key != nested} if nested else {}
    return tensors, rest


def _settings(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The released code's configuration; what is no plain value (a placeholder) is left out."""
    hyper = entries.get("hyper_parameters", {})
    config = hyper.get("config", hyper) if isinstance(hyper, Mapping) else {}
    return plain(config) if isinstance(config, Mapping) else {}


def plain(node: Any) -> Any:
    """Plain values alone, as JSON has them."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items() if _is_plain(value)}
    return [plain(value) for value in node if _is_plain(value)] if isinstance(node, list | tuple) else node


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | Mapping | list | tuple)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def drop(tensors: Mapping[str, Tensor], patterns: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the rest, what the patterns name). Raises CheckpointError for a pattern that names nothing."""
    dropped: dict[str, Tensor] = {}
    for pattern in patterns:
        named = {key: tensor for key, tensor in tensors.items() if fnmatch.fnmatchcase(key, pattern)}
        if not named:
            raise CheckpointError(f"--drop {pattern}: no tensor has such a name")
        dropped |= named
    return {key: tensor for key, tensor in tensors.items() if key not in dropped}, dropped
