"""Draws docs/architecture.png: python docs/architecture.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

TEXT, IMAGE, CROSS, BRIDGE, HEAD = "#f4c79a", "#a9cbe8", "#cfe3c3", "#fff2b3", "#e3d3ea"
COLUMN = {"text": 1.6, "text_cross": 5.0, "image_cross": 7.8, "image": 11.2}
# Height of each row: the layers below the bridges, then three of the bridged ones.
BELOW, ROWS, TOP = 1.5, (3.0, 4.7, 6.9), 8.6
WIDE, HIGH = 2.1, 0.62


def box(ax: Axes, x: float, y: float, words: str, colour: str, width: float = WIDE, high: float = HIGH) -> None:
    corner = (x - width / 2, y - high / 2)
    ax.add_patch(FancyBboxPatch(corner, width, high, "round,pad=0.02,rounding_size=0.09", fc=colour, ec="#555", lw=0.9))
    ax.text(x, y, words, ha="center", va="center", fontsize=8.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], words: str = "", **style) -> None:
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.0, "color": "#444", "shrinkA": 0, "shrinkB": 0} | style
    )
    if words:
        ax.text(
            (start[0] + end[0]) / 2, start[1] + 0.12, words, ha="center", fontsize=7.5, color="#444", linespacing=1.1
        )


def uni_modal(ax: Axes, side: str, name: str, colour: str, source: str) -> None:
    """One encoder, bottom to top, with the number of each layer at base size."""
    x = COLUMN[side]
    ax.text(x, 0.25, source, ha="center", fontsize=9)
    arrow(ax, (x, 0.5), (x, BELOW - HIGH / 2))
    box(ax, x, BELOW, f"{name}: layers 1 to 6", colour)
    before = BELOW
    for number, y in zip((7, 8, 12), ROWS, strict=True):
        arrow(ax, (x, before + HIGH / 2), (x, y - HIGH / 2), linestyle=":" if number == 12 else "-")
        box(ax, x, y, f"layer {number}", colour)
        before = y
    box(ax, x, before + 1.0, "ITC head on [CLS]", HEAD)
    arrow(ax, (x, before + HIGH / 2), (x, before + 1.0 - HIGH / 2))


def cross_modal(ax: Axes, side: str, colour: str) -> None:
    """One stack: bridge and layer of each row."""
    encoder, other = COLUMN[side], COLUMN[f"{side}_cross"]
    inner = 1 if side == "text" else -1
    for number, y in zip((1, 2, 6), ROWS, strict=True):
        first = number == 1
        box(ax, other, y, "LayerNorm (Z$_0$)" if first else "+ , LayerNorm", BRIDGE, high=0.46)
        arrow(ax, (encoder + inner * WIDE / 2, y), (other - inner * WIDE / 2, y), "linear\n+ type" if first else "")
        box(ax, other, y + 0.8, f"cross-modal layer {number}", colour)
        arrow(ax, (other, y + 0.23), (other, y + 0.8 - HIGH / 2))
    for low, high in zip(ROWS, ROWS[1:], strict=False):
        arrow(ax, (other, low + 0.8 + HIGH / 2), (other, high - 0.23), linestyle=":" if high == ROWS[2] else "-")
    arrow(ax, (other, ROWS[2] + 0.8 + HIGH / 2), (other, TOP + 0.25 - HIGH / 2))


def draw(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9.6, 6.8))
    uni_modal(ax, "text", "RoBERTa", TEXT, "unique texts")
    uni_modal(ax, "image", "CLIP ViT", IMAGE, "unique images")
    cross_modal(ax, "text", TEXT)
    cross_modal(ax, "image", IMAGE)
    left, right = COLUMN["text_cross"], COLUMN["image_cross"]
    for y in ROWS:  # each layer reads the other modality's input of the same row
        for start, end in ((left, right), (right, left)):
            way = 1 if end > start else -1
            arrow(ax, (start + way * WIDE / 2, y + 0.05), (end - way * WIDE / 2, y + 0.78), color="#999", lw=0.8)
    box(
        ax,
        (left + right) / 2,
        TOP + 0.25,
        "poolers: tanh of both [CLS], side by side",
        CROSS,
        width=right - left + WIDE,
    )
    arrow(ax, ((left + right) / 2, TOP + 0.25 + HIGH / 2), ((left + right) / 2, 9.65 - HIGH / 2))
    box(ax, (left + right) / 2, 9.65, "ITM, VQA, SNLI-VE, NLVR2, ranking", HEAD, width=4.3)
    box(ax, COLUMN["text"], 9.65, "MLM (masked tokens)", HEAD)
    arrow(ax, (left - 0.7, ROWS[2] + 0.8 + HIGH / 2), (COLUMN["text"] + 0.7, 9.65 - HIGH / 2))
    calls = {"encode_texts": COLUMN["text"], "fuse(pairs)": (left + right) / 2, "encode_images": COLUMN["image"]}
    for words, x in calls.items():
        ax.text(
            x, -0.25 if "encode" in words else 2.2, words, ha="center", fontsize=9, family="monospace", color="#333"
        )
    ax.set(xlim=(0.4, 12.4), ylim=(-0.5, 10.1))
    ax.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
