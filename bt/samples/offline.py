"""Shards of a few real samples of each data set, made on this machine from the package easy-VQA."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from omegaconf import OmegaConf

from bt.config.entry import CONF_DIR
from bt.config.targets import load_target
from bt.data.index import NAME as INDEX
from bt.data.sources.base import Source, read_json
from bt.data.sources.glue import TASKS
from bt.data.write import convert
from bt.errors import ConfigError, DataError
from bt.samples.easy_vqa import easy_vqa, package_data
from bt.samples.trees import TREES, write_tree
from bt.samples.trees.glue import glue_task

_PICTURES = 24
NAMES = (*(name for name in TREES if name != "glue"), *(f"glue_{task}" for task in TASKS), "easy_vqa")


def offline_shards(name: str, folder: Path) -> Path:
    """The shards folder/<name> of about 24 pictures of easy-VQA in the form of a data set, with all its splits.

    name: one of NAMES, the sources of conf/source/ and glue_<task>. Made by the writers of bt/samples/trees and the
    source itself, when they are first asked for, and whole or not at all, whatever other processes do. In a second.

    Raises ConfigError for another name, DataError if the package is missing or folder cannot be written to.
    """
    if name not in NAMES:
        raise ConfigError(f"no offline samples of {name}: there are {', '.join(NAMES)}")
    out = folder / name
    if (out / INDEX).is_file():
        return out
    work = folder / f".{name}.{uuid.uuid4().hex}"
    try:
        convert(source_of(name, _raw(name, work / "raw")), work / "shards")
        _move(work / "shards", out)
    except OSError as error:
        raise DataError(f"cannot make samples of {name} in {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def source_of(name: str, raw_dir: Path) -> Source:
    """The source of conf/source/, as `python -m bt.convert source=NAME raw_dir=DIR` makes it. glue_<task> is the one of
    `source=glue source.task=<task>`."""
    source, _, task = name.partition("_") if name.startswith("glue_") else (name, "", "")
    node = OmegaConf.create({"raw_dir": str(raw_dir), "split": None})
    node.source = OmegaConf.load(Path(CONF_DIR) / "source" / f"{source}.yaml")
    if task:
        node.source.task = task
    arguments = OmegaConf.to_container(node, resolve=True)["source"]
    target = load_target(arguments, "source")
    return target(**{key: value for key, value in arguments.items() if key != "_target_"})


def _raw(name: str, raw_dir: Path) -> Path:
    if name == "easy_vqa":
        return _package(raw_dir)
    collection = easy_vqa(_PICTURES)
    if name.startswith("glue_"):
        glue_task(name.removeprefix("glue_"), collection, raw_dir, 0)
        return raw_dir
    return write_tree(name, collection, raw_dir)


def _package(raw_dir: Path) -> Path:
    """The package's first images and their questions, as it has them."""
    package = package_data()
    for part, count in (("train", _PICTURES - 4), ("test", 4)):
        images = raw_dir / "data" / part / "images"
        images.mkdir(parents=True)
        for number in range(count):
            shutil.copyfile(package / part / "images" / f"{number}.png", images / f"{number}.png")
        asked = [entry for entry in read_json(package / part / "questions.json") if entry[2] < count]
        (images.parent / "questions.json").write_text(json.dumps(asked))
    shutil.copyfile(package / "answers.txt", raw_dir / "data/answers.txt")
    return raw_dir


def _move(made: Path, out: Path) -> None:
    """Give finished shards their name; if another process was quicker, its shards, which are the same, stay."""
    try:
        os.rename(made, out)
    except OSError:
        if not (out / INDEX).is_file():
            raise
