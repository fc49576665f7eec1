"""Contrastive fine-tuning with data loading, beside transformers' BridgeTowerForContrastiveLearning.

On a GPU it is the work of the published record (BridgeTower-large, 294 px, bf16, 40 pairs a device: 31.8 samples/s on
an A100 80GB); on a CPU the same at a small size, as a test of itself.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import BridgeTowerForContrastiveLearning

from bt.bench.case import Case
from bt.bench.data_cases import make_photos
from bt.bench.models import Size, Step, make_model, peer_config
from bt.data.batch import Batch
from bt.data.collate import BatchMaker
from bt.data.dataset import train_loader
from bt.data.plan import PairIndex, TrainPlan
from bt.data.shards import ShardSet
from bt.data.sources.image_folder_csv import ImageFolderCSV
from bt.data.text import train_tokenizer
from bt.data.transforms import make_transform
from bt.data.write import convert
from bt.engine.precision import autocast
from bt.interop.huggingface import from_huggingface
from bt.tasks.contrastive import Contrastive
from bt.tasks.itc import no_targets

LARGE = Size(width=1024, depth=24, heads=16, patch=14, image=294)
SMALL = Size(width=128, depth=4, heads=2, cross_layers=2, vocabulary=600, image=96)
WORDS = (
    "red blue old small large wooden bright quiet man woman dog horse boat tree street river near under with".split()
)
# Dense bf16 products a second, by a part of the device's name (manufacturer's data sheets).
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "A10": 125e12}


def make_pairs(folder: Path, count: int) -> list[str]:
    """Shards of `count` photos, each with a caption of 8 to 14 words; returns the captions."""
    make_photos(folder, count)
    draw = np.random.default_rng(0)
    captions = [" ".join(draw.choice(WORDS, draw.integers(8, 15))) for _ in range(count)]
    with open(folder / "photos.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text"])
        rows.writerows((f"photos/a/{number:03d}.jpg", caption) for number, caption in enumerate(captions))
    convert(ImageFolderCSV(str(folder)), folder / "shards")
    return captions


def batches(folder: Path, captions: list[str], size: Size, batch: int, device: torch.device) -> Iterator[Batch]:
    """Without end, from the shards, the same for both sides; official augmentation, on a GPU machine in workers."""
    shards = ShardSet(str(folder / "shards"), "train")
    plan = TrainPlan(PairIndex(shards.counts("captions")), shards.starts, seed=0, global_batch=batch)
    maker = BatchMaker(
        shards,
        plan.index,
        text_field="captions",
        tokenizer=train_tokenizer(captions),
        transform=make_transform("blip_randaug_wc", size.image, resize="fast"),
        seed=0,
        max_text_len=40,
        targets={"contrastive": no_targets},
    )
    on_gpu = device.type == "cuda"
    workers = 12 if on_gpu else 0
    for ready in train_loader(plan, maker, start_step=0, total_steps=10**6, workers=workers, pin_memory=on_gpu):
        yield ready.to(device)


def contrastive(tiny: bool = False) -> Case:
    """Steps on batches as they come from the shards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    size, batch = (LARGE, 40) if on_gpu else (SMALL, 4 if tiny else 16)
    precision = "bf16" if on_gpu else "fp32"
    holder = TemporaryDirectory(prefix="bt-bench-")
    folder = Path(holder.name)
    captions = make_pairs(folder, 4 * batch)
    config = peer_config(size, contrastive_hidden_size=512, logit_scale_init_value=2.6592)
    peer = BridgeTowerForContrastiveLearning(config).train()
    model = make_model(size, lambda context: {"contrastive": Contrastive(context)})
    model.load_state_dict(from_huggingface(peer.state_dict()))
    peer, model = peer.to(device), model.to(device)

    def side(loss: Callable[[Batch], Tensor]) -> Callable[[], list[Tensor]]:
        source = batches(folder, captions, size, batch, device)

        def losses() -> list[Tensor]:
            with autocast(device, precision):
                return [loss(next(source))]

        return losses

    def theirs(batch: Batch) -> Tensor:
        image_rows, text_rows = batch.pairs.unbind(1)
        pixels = model.tower.vision.normalize(batch.images)[image_rows]
        ids, mask = batch.texts.ids[text_rows], batch.texts.mask[text_rows].long()
        return peer(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True).loss

    ours = Step(model, side(lambda made: model(made)["contrastive"].loss / len(made.pairs)))
    name = torch.cuda.get_device_name() if on_gpu else ""
    return Case(
        batch,
        ours,
        Step(peer, side(theirs)),
        unit="samples/s",
        tolerance=1e-2 if on_gpu else 1e-4,
        peak=next((peak for part, peak in PEAKS.items() if part in name), None),
        notes={"device": name or "CPU: a small size, as a test of itself", "parameters": count(model)},
        flops=True,
        holds=holder,
    )


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
