"""Raw trees by source: `TREES`, and `write_tree`, which writes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bt.errors import ConfigError
from bt.samples.collection import Collection
from bt.samples.trees import captions, cifar, glue, labelled, questions

TREES: dict[str, Callable[[Collection, Path, int], None]] = {
    "coco_karpathy": captions.coco_karpathy,
    "flickr30k_karpathy": captions.flickr30k_karpathy,
    "visual_genome": captions.visual_genome,
    "sbu": captions.sbu,
    "cc3m": captions.cc3m,
    "vqav2": questions.vqav2,
    "vgqa": questions.vgqa,
    "nlvr2": labelled.nlvr2,
    "snli_ve": labelled.snli_ve,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "glue": glue.glue,
    "image_folder_csv": labelled.image_folder_csv,
}


def write_tree(source: str, collection: Collection, raw_dir: Path, seed: int = 0) -> Path:
    """The raw files of a source (a name of conf/source/) in raw_dir, as its module's docstring in bt/data/sources shows
    them; returns raw_dir. The same collection and seed give the same bytes.

    ConfigError for a source that has no such tree.
    """
    if source not in TREES:
        raise ConfigError(f"source {source}: there are trees of {', '.join(TREES)}")
    raw_dir.mkdir(parents=True, exist_ok=True)
    TREES[source](collection, raw_dir, seed)
    return raw_dir
