"""One image with several texts: the same losses and gradients as when the pairs come one by one."""

import pytest
import torch

from bt.data.batch import Batch, Texts
from bt.tasks.base import TaskModel
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM
from bt.tasks.vqa import VQA
from tests.models.towers import gradients, make_images, make_texts, make_tower
from tests.tasks.helpers import CONTEXT, make_batch

IMAGES = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 1, 0])  # five texts each
TEXTS = torch.tensor([3, 0, 1, 8, 5, 2, 4, 3, 7, 6])  # text 3 is a text of both
SHOWN = torch.where(torch.arange(10) % 3 == 0, 1 - IMAGES, IMAGES)  # what ITM pairs the texts with
IDS = torch.tensor([31, 17])
OBJECTIVES = {"mlm": MLM, "itm": ITM, "itc": ITC, "vqa": VQA}


def pick(name: str, rows: torch.Tensor, shown: torch.Tensor, text_rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The targets of the pairs `rows`, whose images and texts lie in the given rows of the batch."""
    texts = make_texts(9)
    generator = torch.Generator().manual_seed(4)
    ids, mask = texts.ids[TEXTS], texts.mask[TEXTS]
    positions = (torch.rand(ids.shape, generator=generator) < 0.4) & mask & (ids > 4)
    scores = torch.rand(10, 4, generator=generator)
    ids, mask, positions, labels = ids[rows], mask[rows], positions[rows], ids[rows][positions[rows]]
    return {
        "mlm": {"ids": ids.masked_fill(positions, 4), "mask": mask, "positions": positions, "labels": labels},
        "itm": {"pairs": torch.stack([shown, text_rows], 1), "labels": (SHOWN == IMAGES).long()[rows]},
        "itc": {"pair": torch.arange(len(rows))},
        "vqa": {"scores": scores[rows], "answered": rows != 3},
    }[name]


def grouped(name: str) -> list[Batch]:
    """Two images, nine texts, ten pairs."""
    targets = {name: pick(name, torch.arange(10), SHOWN, TEXTS)}
    pairs = torch.stack([IMAGES, TEXTS], 1)
    return [make_batch(make_texts(9), pairs, targets, images=make_images(2).double(), image_ids=IDS.tolist())]


def stacked(name: str) -> list[Batch]:
    """Every pair with its own copy of image and text, in one batch; the false images of ITM below them."""
    rows, texts = torch.arange(10), make_texts(9)
    shown = torch.where(SHOWN == IMAGES, rows, rows + 10)
    images, ids = make_images(2).double(), torch.cat([IDS[IMAGES], IDS[SHOWN]])
    images = torch.cat([images[IMAGES], images[SHOWN]])
    copies = Texts(texts.ids[TEXTS], texts.mask[TEXTS])
    targets = {name: pick(name, rows, shown, rows)}
    return [make_batch(copies, torch.stack([rows, rows], 1), targets, images=images, image_ids=ids.tolist())]


def alone(name: str) -> list[Batch]:
    """Ten batches of one pair, row 1 being the image that ITM shows."""
    batches, texts, zero = [], make_texts(9), torch.zeros(1, dtype=torch.long)
    for i, (image, text, shown) in enumerate(zip(IMAGES, TEXTS, SHOWN, strict=True)):
        one = Texts(texts.ids[text][None], texts.mask[text][None])
        targets = {name: pick(name, torch.tensor([i]), zero + 1, zero)}
        both = torch.stack([image, shown])
        images = make_images(2).double()[both]
        batches.append(make_batch(one, [[0, 0]], targets, images=images, image_ids=IDS[both].tolist()))
    return batches


@pytest.mark.parametrize(
    "name, singles",
    [(name, stacked) for name in OBJECTIVES] + [(name, alone) for name in ("mlm", "itm", "vqa")],
)
def test_grouped_equals_single(name, singles):
    torch.manual_seed(0)
    # Double precision: what is left of a difference is not rounding.
    model = TaskModel(make_tower(), {name: OBJECTIVES[name](CONTEXT)}).double().train()
    found = []
    for batches in (grouped(name), singles(name)):
        model.zero_grad()
        losses = [model(batch)[name].loss for batch in batches]
        sum(losses).backward()
        found.append((sum(losses).item(), sum(model.counts(batch).item() for batch in batches), gradients(model)))
    (loss, count, expected), (other_loss, other_count, other) = found
    assert loss == pytest.approx(other_loss, rel=1e-5) and loss > 0.1
    assert count == other_count
    assert expected.keys() == other.keys() and len(expected) > 50
    largest = max(gradient.norm().item() for gradient in expected.values())
    for key, gradient in expected.items():
        # The bias of attention keys has no gradient but rounding, hence the absolute part.
        assert (gradient - other[key]).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, key
