"""A small retrieval set, and its evaluation on this rank; run by torchrun or to be killed (test_retrieval.py)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from bt.data.batch import Batch, Texts
from bt.engine import distributed
from bt.engine.distributed import World
from bt.models.bridgetower import BridgeTower
from bt.tasks.base import Measuring, TaskModel
from bt.tasks.itc import ITC
from bt.tasks.itm_itc import HardITM
from bt.tasks.retrieval import Retrieval
from tests.models.towers import make_images, make_texts, make_tower
from tests.tasks.helpers import CONTEXT

# Caption -> image and text: images have one to four captions, texts 3 and 7 are there twice.
IMAGE_OF = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 6, 6, 7, 8, 8, 9, 9, 10]
TEXT_OF = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3, 11, 12, 13, 14, 7, 15, 16, 17]
IDS = [31, 5, 77, 12, 90, 4, 18, 55, 63, 2, 41]
OPTIONS = {
    "all": {"ranker": "itm"},
    "k": {"ranker": "itm", "contrast": "itc", "k_test": 3},
    "similarity": {"ranker": None, "contrast": "itc"},
}


def make_model() -> TaskModel:
    torch.manual_seed(3)
    model = TaskModel(make_tower(), {"itc": ITC(CONTEXT, size=8), "itm": HardITM(CONTEXT)})
    with torch.no_grad():
        model.objectives["itm"].head.fc.weight.mul_(40)  # scores that differ by more than rounding
    return model.eval()


def texts_of(rows: list[int]) -> Texts:
    """Padded to the longest of them."""
    texts = make_texts(18)
    length = int(texts.mask[rows].sum(1).max())
    return Texts(texts.ids[rows, :length], texts.mask[rows, :length])


def make_batches(size: int) -> list[Batch]:
    """Captions in order, `size` in a batch, which can part the captions of an image. Each batch also has an image and a
    text that no pair of it names, as objectives draw them."""
    batches = []
    for first in range(0, len(IMAGE_OF), size):
        captions = range(first, min(first + size, len(IMAGE_OF)))
        images = [0, *dict.fromkeys(IMAGE_OF[caption] for caption in captions)]
        texts = [17, *dict.fromkeys(TEXT_OF[caption] for caption in captions)]
        pairs = [[images.index(IMAGE_OF[c], 1), texts.index(TEXT_OF[c], 1)] for c in captions]
        ids = torch.tensor([IDS[image] for image in images])
        batches.append(
            Batch(make_images(11)[images], texts_of(texts), torch.tensor(pairs), ids, torch.tensor(list(captions)))
        )
    return batches


def evaluate(case: str, size: int, world: World, how: Measuring, **options) -> dict[str, float]:
    evaluator = Retrieval(**OPTIONS[case], **{"pairs": 7, **options})
    with torch.no_grad():
        return evaluator(make_model(), make_batches(size)[world.rank :: world.size], world, how)


def main() -> None:
    """Output file, directory for work, seconds that each call of fuse takes longer; cases with captions in a batch."""
    out, work, wait, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    if float(wait):
        fuse = BridgeTower.fuse
        BridgeTower.fuse = lambda *arguments: (time.sleep(float(wait)), fuse(*arguments))[1]
    how = Measuring("test", work_dir=Path(work), identity="one", cache_bytes=20_000)
    found = []
    for case in cases:
        name, size = case.split(":")
        found.append(distributed.gather_objects(evaluate(name, int(size), world, how)))
    if world.main:
        Path(out).write_text(json.dumps(found))
    distributed.leave()


if __name__ == "__main__":
    main()
