"""Loading: from shards to normalised tensors, beside the official way and torchvision's, one thread each.

The images are 48 different parts of a photograph (matplotlib's sample data), 640 x 480 pixels, JPEG at quality 90, as
large as COCO's. The transform is the official fine-tuning one: random crop, flip, RandAugment. Beside decoding and
resizing alone it is the one without augmentation, which squashes the whole image.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.cbook
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize as resize_tensor

from bt.bench.case import Case
from bt.data.collate import BatchMaker
from bt.data.plan import PairIndex, TrainPlan
from bt.data.randaugment import BlipRandAugment
from bt.data.rules import ImageRules
from bt.data.shards import ShardSet
from bt.data.sources.image_folder_csv import ImageFolderCSV
from bt.data.text import train_tokenizer
from bt.data.transforms import make_transform
from bt.data.write import convert
from bt.models.encoders.base import CLIP_MEAN, CLIP_STD, normalize_pixels

IMAGES, BATCH = 48, 16
CONVERTED = 600  # so many that starting processes does not count
BICUBIC = transforms.InterpolationMode.BICUBIC


def make_photos(folder: Path, count: int = IMAGES) -> None:
    """As ImageFolder wants them: photos/<class>/<name>.jpg; and photos.csv, which names them."""
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")) as photo:
        photo = photo.convert("RGB").resize((1024, 1200), Image.Resampling.LANCZOS)
    (folder / "photos/a").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with open(folder / "photos.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for number in range(count):
            left, top = draw.integers((1024 - 640, 1200 - 480))
            name = f"photos/a/{number:03d}.jpg"
            photo.crop((left, top, left + 640, top + 480)).save(folder / name, quality=90)
            rows.writerow([name, "a"])


def from_shards(folder: Path, size: int, route: str, transform: str, normalised: bool = True) -> Callable[[], Tensor]:
    """bt: all images of an epoch in batches: uint8 as workers make them, or normalised as the encoder does it."""
    shards = ShardSet(str(folder / "shards"), "train")
    plan = TrainPlan(PairIndex(shards.counts(None)), shards.starts, seed=0, global_batch=BATCH)
    maker = BatchMaker(
        shards,
        plan.index,
        text_field=None,
        tokenizer=train_tokenizer(["none"]),
        transform=make_transform(transform, size, resize=route),
        seed=0,
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

    def load() -> Tensor:
        for step in range(IMAGES // BATCH):
            images = maker(plan.cut(step)).images
            if normalised:
                images = normalize_pixels(images, 255 * mean, 1 / (255 * std))
        return images

    return load


class RandAugment:
    """The official operations on a PIL image, as the official transform calls them."""

    def __init__(self):
        self.augment, self.rng = BlipRandAugment(5), np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(self.augment(np.array(image), self.rng))


def official_way(folder: Path, size: int) -> Callable[[], Tensor]:
    """An Arrow file of encoded images, PIL, float tensors one by one, copied into a batch of zeros."""
    with pa.OSFile(str(folder / "photos.arrow"), "wb") as sink:
        data = [path.read_bytes() for path in sorted((folder / "photos/a").iterdir())]
        table = pa.table({"image": pa.array(data, pa.binary())})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            RandAugment(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )

    def load() -> Tensor:
        column = pa.ipc.open_file(pa.memory_map(str(folder / "photos.arrow"))).read_all()["image"]
        for first in range(0, IMAGES, BATCH):
            encoded = (column[row].as_py() for row in range(first, first + BATCH))
            views = [chain(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded]
            batch = torch.zeros(BATCH, 3, max(v.shape[1] for v in views), max(v.shape[2] for v in views))
            for row, view in enumerate(views):
                batch[row, :, : view.shape[1], : view.shape[2]] = view
        return batch

    return load


def image_folder(folder: Path, size: int) -> Callable[[], Tensor]:
    """torchvision's ImageFolder and DataLoader."""
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(2, 5),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    loader = DataLoader(ImageFolder(str(folder / "photos"), chain), BATCH, shuffle=True)

    def load() -> Tensor:
        for images, _ in loader:
            last = images
        return last

    return load


def decoding_alone(route: str) -> Callable[[Path, int], Callable[[], Tensor]]:
    """The same libraries' calls to decode and resize images in memory, and nothing else."""

    def make(folder: Path, size: int) -> Callable[[], Tensor]:
        files = [path.read_bytes() for path in sorted((folder / "photos/a").iterdir())]
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

        def fast() -> Tensor:
            for data in encoded:
                pixels = decode_jpeg(data, mode=ImageReadMode.RGB)
                last = resize_tensor(pixels, [size, size], BICUBIC, antialias=True)
            return last

        def exact() -> Tensor:
            for data in files:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                image = image.resize((size, image.height), Image.Resampling.BICUBIC)
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

        return fast if route == "fast" else exact

    return make


def resizing_error(folder: Path, size: int, route: str) -> float:
    """The largest difference from Pillow's own resizing, in units of the pixels' range, without augmentation."""
    data = (folder / "photos/a/000.jpg").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        peer = np.array(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    ours = make_transform("blip", size, resize=route)(data).permute(1, 2, 0).numpy().astype(int)
    return np.abs(ours - peer).max().item() / 255


def loading(
    size: int,
    route: str,
    peer: Callable[[Path, int], Callable[[], Tensor]],
    transform: str = "blip_randaug",
    normalised: bool = True,
) -> Case:
    holder = TemporaryDirectory(prefix="bt-bench-")
    folder = Path(holder.name)
    make_photos(folder)
    convert(ImageFolderCSV(str(folder)), folder / "shards")
    ours, theirs = from_shards(folder, size, route, transform, normalised), peer(folder, size)
    return Case(
        count=IMAGES,
        ours=ours,
        peer=theirs,
        unit="images/s",
        threads=1,
        # Two grey levels: what torchvision's kernel for uint8 may differ.
        check=lambda: resizing_error(folder, size, route),
        tolerance=2 / 255 if route == "fast" else 0.0,
        holds=holder,
    )


def converting(check: str) -> Case:
    """Raw files to shards with index, checksums and checked images, against `tar` of the same files, both synced."""
    holder = TemporaryDirectory(prefix="bt-bench-")
    folder = Path(holder.name)
    make_photos(folder, CONVERTED)
    size = sum(path.stat().st_size for path in folder.glob("photos/a/*"))
    targets = (folder / f"shards-{number}" for number in itertools.count())
    stored = []

    def ours() -> Tensor:
        index, _ = convert(ImageFolderCSV(str(folder)), next(targets), workers=2, images=ImageRules(check=check))
        stored.append(index.samples("train"))
        return torch.tensor(index.samples("train"))

    def peer() -> Tensor:
        subprocess.run(["tar", "cf", "photos.tar", "photos"], cwd=folder, check=True)
        with open(folder / "photos.tar", "rb") as file:
            os.fsync(file.fileno())
        return torch.tensor(CONVERTED)

    def lost() -> float:
        return abs(stored[-1] - CONVERTED)

    return Case(size / 1e6, ours, peer, unit="MB/s", check=lost, tolerance=0, holds=holder)


DATA_CASES = (
    {
        f"data_{size}_{name}": (
            f"shards to normalised tensors, {size} px, data.resize={route}, against {what}",
            lambda _, size=size, route=route, peer=peer: loading(size, route, peer),
        )
        for size in (576, 288)
        for name, route, peer, what in (
            ("fast", "fast", official_way, "the official way"),
            ("exact", "pil", official_way, "the official way"),
            ("imagefolder", "fast", image_folder, "torchvision's ImageFolder"),
        )
    }
    | {
        f"data_{size}_{name}_{end}": (
            f"{what}, {size} px without augmentation, data.resize={route}, against decoding and resizing alone "
            "(1.00: all else takes no time)",
            lambda _, size=size, route=route, end=end: loading(
                size, route, decoding_alone(route), "blip", normalised=end == "alone"
            ),
        )
        for size in (576, 288)
        for name, route in (("fast", "fast"), ("exact", "pil"))
        for end, what in (("loader", "shards to uint8 batches, as workers make them"), ("alone", "normalised too"))
    }
    | {
        f"convert_{check}": (
            f"raw JPEGs to shards, images.check={check}, two workers, against tar",
            lambda _, check=check: converting(check),
        )
        for check in ("full", "header")
    }
)
