"""Raw trees in official formats out of real images and words: those of the package easy-VQA, numbered as there."""

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from bt.data.collate import BatchMaker
from bt.data.plan import PairIndex, TrainPlan
from bt.data.shards import Sample, ShardSet
from bt.data.text import train_tokenizer
from bt.data.transforms import make_transform
from tests.data.helpers import RAW


def jpeg(number: int) -> bytes:
    """Image `number` of easy-VQA as JPEG: 64 x 64 pixels."""
    buffer = io.BytesIO()
    Image.open(RAW / "train" / "images" / f"{number}.png").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@functools.cache
def _questions() -> dict[int, list[tuple[str, str]]]:
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((RAW / "train" / "questions.json").read_text()):
        by_image.setdefault(image, []).append((question, answer))
    return by_image


def asked(number: int) -> list[tuple[str, str]]:
    """Questions on an image with their answers, each question once."""
    return list(dict(_questions()[number]).items())


def words(number: int, texts: int) -> list[str]:
    """So many different texts that belong to an image."""
    return [question for question, _ in asked(number)][:texts]


def put(path: Path, content: Any) -> Path:
    """Write a file and its folders: bytes as they are, text as UTF-8, all else as json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def samples_of(out_dir: Path, split: str) -> dict[str, Sample]:
    """All samples of a converted split by key, in order."""
    shards = ShardSet(out_dir, split)
    return {sample.key: sample for sample in map(shards.read, range(len(shards)))}


def first_batch(out_dir: Path, split: str, field: str):
    """A training batch of four pairs from converted data."""
    shards = ShardSet(out_dir, split)
    index = PairIndex(shards.counts(field))
    maker = BatchMaker(
        shards,
        index,
        text_field=field,
        tokenizer=train_tokenizer(shards.all_texts()),
        transform=make_transform("clip", 64),
        seed=1,
        max_text_len=20,
    )
    return maker(TrainPlan(index, shards.starts, seed=1, global_batch=4).cut(0))


def img2dataset_shard(path: Path, samples: dict[str, dict[str, bytes]], failed: int = 0) -> Path:
    """A tar shard as img2dataset writes it, with its statistics. samples: by key, the files by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    counts = {"count": len(samples) + failed, "successes": len(samples), "failed_to_download": failed}
    put(path.with_name(f"{path.stem}_stats.json"), {**counts, "failed_to_resize": 0, "status_dict": {"success": 1}})
    put(path.with_suffix(".parquet"), b"PAR1")
    return path


def img2dataset_sample(number: int) -> dict[str, bytes]:
    """The files of one sample in such a shard, by ending."""
    meta = {"url": f"http://example.org/{number}.jpg", "width": 64, "height": 64}
    return {"jpg": jpeg(number), "json": json.dumps(meta).encode(), "txt": words(number, 1)[0].encode()}
