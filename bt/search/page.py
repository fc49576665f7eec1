"""Hits to look at: a contact sheet, and a page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from bt.data.decode import UNDECODABLE, convert, decode
from bt.data.shards import write_atomic
from bt.inference.inputs import data_url
from bt.search.query import Hit

SIDE, LINE, COLUMNS = 192, 18, 5  # pixels of a picture and of the line below it; pictures in a row


def thumbnail(path: Path) -> Image.Image:
    """The picture on a white square; white alone where it is gone by now."""
    try:
        image = convert(decode(path.read_bytes()), "RGB")
    except UNDECODABLE:
        image = Image.new("RGB", (1, 1), "white")
    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BICUBIC, "white")


def caption(number: int, hit: Hit) -> str:
    parts = [f"{number}."]
    parts += [] if hit.score is None else [f"match {hit.score:.3f}"]
    parts += [] if hit.similarity is None else [f"cosine {hit.similarity:.3f}"]
    return "  ".join(parts)


def contact_sheet(text: str, hits: Sequence[Hit], path: Path) -> None:
    """A PNG of the hits in rows of five, best first."""
    rows = -(-len(hits) // COLUMNS) or 1
    sheet = Image.new("RGB", (COLUMNS * SIDE, LINE + rows * (SIDE + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    # Pillow's own font has Latin letters alone.
    draw.text((4, 3), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    for number, hit in enumerate(hits):
        x, y = number % COLUMNS * SIDE, LINE + number // COLUMNS * (SIDE + LINE)
        sheet.paste(thumbnail(hit.path), (x, y))
        draw.text((x + 4, y + SIDE + 3), caption(number + 1, hit), fill="black")
    temporary = path.with_name(f".{path.name}")
    sheet.save(temporary, "PNG")
    temporary.replace(path)


def page(text: str, hits: Sequence[Hit], path: Path) -> None:
    """An HTML page with the pictures in it; whatever the text and the paths hold is shown, never run."""
    figures = []
    for number, hit in enumerate(hits, 1):
        name = html.escape(str(hit.path))
        figures.append(
            f'<figure><img src="{data_url(thumbnail(hit.path))}" alt="{name}" title="{name}">'
            f"<figcaption>{html.escape(caption(number, hit))}<br>{html.escape(hit.path.name)}</figcaption></figure>"
        )
    title = html.escape(text)
    style = "body{font:14px sans-serif}figure{display:inline-block;margin:8px;width:192px;overflow-wrap:anywhere}"
    document = (
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>'
        f"<body><h1>{title}</h1>{''.join(figures)}</body></html>\n"
    )
    write_atomic(path, document.encode("utf-8", "backslashreplace"))
