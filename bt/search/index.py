"""The index of a folder of pictures: uni-modal features to compare, and states to re-rank, computed once.

DIR/index.json names the pictures; DIR/part-%05d.safetensors holds, for those of them that can be read, `rows` (their
numbers), `features` (n, size) float32 and `states` (n, layers, tokens, width) in half precision. Its metadata say which
files it was made of, with size and time of each, so that a part with another file is made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bt.data.shards import write_atomic
from bt.engine.progress import Countdown
from bt.errors import DataError
from bt.inference.predictor import Predictor
from bt.models.bridgetower import Encoded
from bt.tasks.retrieval import fingerprint

VERSION = 2
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PART = 256  # pictures in a file: what an interruption can cost


def find_pictures(folder: Path) -> list[str]:
    """Paths below `folder`, by their endings, in alphabetical order. Links to folders are not followed."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found = []
    for root, _, names in os.walk(folder):
        found += [os.path.join(root, name) for name in names if name.lower().endswith(ENDINGS)]
    if not found:
        raise DataError(f"{folder} has no pictures: their names end in {', '.join(ENDINGS)}")
    return sorted(os.path.relpath(path, folder) for path in found)


def build(model: Predictor, folder: Path, out: Path, *, states: bool = True, skip_bad: bool = True) -> dict[str, Any]:
    """Writes the index of all pictures below `folder` to `out`, or goes on with the one that is there: parts whose
    pictures are other files by now are made anew.

    states: False keeps no states; a query then encodes its shortlist anew. skip_bad: pictures that cannot be read are
    counted; else DataError. Returns what index.json says.
    """
    check_searchable(model)
    folder, names = folder.resolve(), find_pictures(folder)
    about = {"version": VERSION, "weights": fingerprint(model.model), "folder": str(folder)}
    about |= {"pixels": _pixels(model), "states": states and model.match_kinds[0] != "itc"}
    if (out / "index.json").exists():
        begun = _read(out)
        if {key: begun.get(key) for key in about} != about:
            raise DataError(
                f"{out} holds the index of another folder, of another model or of images prepared otherwise: remove it "
                "or give another"
            )
    out.mkdir(parents=True, exist_ok=True)
    about["images"] = names
    _write(out, {**about, "complete": False})
    progress = Countdown("indexing", len(names), "picture")
    bad: dict[str, str] = {}
    for number, start in enumerate(range(0, len(names), PART)):
        path, part = out / f"part-{number:05d}.safetensors", names[start : start + PART]
        files = [_file(folder / name, name) for name in part]
        known = _metadata(path)
        if known.get("files") != json.dumps(files):
            known = _write_part(model, folder, start, files, path, about["states"], skip_bad)
        bad |= json.loads(known["bad"])
        progress.add(len(part))
    progress.close()
    for path in sorted(out.glob("part-*.safetensors"))[-(-len(names) // PART) :]:
        path.unlink()  # of pictures that are gone
    if len(bad) == len(names):
        raise DataError(f"none of the {len(names)} pictures in {folder} can be read: {next(iter(bad.values()))}")
    complete = {**about, "complete": True, "bad": bad}
    _write(out, complete)
    return complete


def check_searchable(model: Predictor) -> None:
    if not model.match_kinds:
        raise DataError(f"{model.source} has neither ITC nor ITM: nothing to search by")


def _pixels(model: Predictor) -> list[Any]:
    """How pictures are prepared, as JSON values."""
    data, vision = model.loaded.config.data, model.tower.vision
    sizes = [vision.image_size, vision.channels, *vision.mean, *vision.std]
    return [data.eval_transform, data.resize, data.decode_draft, *sizes]


def _file(path: Path, name: str) -> list[Any]:
    """Tells versions of a file apart; [name] of one that cannot be read."""
    try:
        about = path.stat()
    except OSError:
        return [name]
    return [name, about.st_size, about.st_mtime_ns]


def _metadata(path: Path) -> dict[str, str]:
    """Of a part; {} where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _write_part(
    model: Predictor, folder: Path, start: int, files: list[list], path: Path, states: bool, skip_bad: bool
) -> dict[str, str]:
    """Returns the part's metadata."""
    pixels, rows, bad = [], [], {}
    for number, (name, *_) in enumerate(files, start):
        try:
            pixels.append(model.preprocess(folder / name))
            rows.append(number)
        except DataError as error:
            if not skip_bad:
                raise
            bad[name] = str(error)
    tensors = {"rows": torch.tensor(rows, dtype=torch.int64)}
    if rows:
        encoded = model.encode_images(pixels)
        if model.contrast is not None:
            tensors["features"] = model.image_features(encoded).cpu()
        if states:
            tensors["states"] = torch.stack(encoded.states, dim=1).to("cpu", torch.float16)
    temporary = path.with_name(f".{path.name}")
    metadata = {"bad": json.dumps(bad), "files": json.dumps(files)}
    save_file(tensors, temporary, metadata)
    temporary.replace(path)
    return metadata


def _write(out: Path, about: dict[str, Any]) -> None:
    write_atomic(out / "index.json", (json.dumps(about, indent=1) + "\n").encode())


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        about = json.loads(path.read_text())
        if about["version"] != VERSION:
            raise DataError(
                f"{path} has version {about['version']}, this program reads {VERSION}: remove it and index again"
            )
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no index of pictures: it has no index.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return about


class ImageIndex:
    """An index that is complete, opened for reading.

    paths: of the pictures that could be read. features: (pictures, size), or None of a model without ITC.
    """

    def __init__(self, folder: Path):
        about = _read(folder)
        if not about.get("complete"):
            raise DataError(f"{folder} is not complete: give the same `index` command again")
        self.weights, self.has_states = about["weights"], about["states"]
        self.places: list[tuple[Path, int]] = []
        self.paths: list[Path] = []
        features = []
        try:
            for part in sorted(folder.glob("part-*.safetensors")):
                with safe_open(part, "pt") as file:
                    rows = file.get_tensor("rows").tolist()
                    features += [file.get_tensor("features")] if "features" in file.keys() else []  # noqa: SIM118
                self.places += [(part, row) for row in range(len(rows))]
                self.paths += [Path(about["folder"], about["images"][row]) for row in rows]
        except (OSError, SafetensorError, IndexError) as error:
            raise DataError(f"{folder} is damaged: {error}") from error
        self.features = torch.cat(features) if features else None

    def __len__(self) -> int:
        return len(self.paths)

    def states(self, numbers: Sequence[int], device: torch.device) -> Encoded:
        """The states of some pictures, as fuse reads them; only their bytes are read."""
        found: dict[int, Tensor] = {}
        by_part: dict[Path, list[int]] = {}
        for number in numbers:
            by_part.setdefault(self.places[number][0], []).append(number)
        for part, wanted in by_part.items():
            with safe_open(part, "pt") as file:
                tensor = file.get_slice("states")
                for number in wanted:
                    row = self.places[number][1]
                    found[number] = tensor[row : row + 1]
        layers = torch.cat([found[number] for number in numbers]).to(device).float().unbind(1)
        return Encoded(list(layers), layers[-1][:, 0])
