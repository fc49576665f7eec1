"""What the trees have in common: images and lists as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def put(path: Path, data: bytes | str) -> Path:
    """Text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put_json(path: Path, data: Any) -> Path:
    return put(path, json.dumps(data, ensure_ascii=False))


def put_lines(path: Path, lines: Iterable[Any]) -> Path:
    """Lines that are not text are written as json."""
    return put(path, "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def put_jpeg(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=95, subsampling=0)
    return path
