"""How the cost of a pre-training step grows, beside what the count of its operations predicts.

python -m bt.bench growth --out DIR [--only texts_per_image,image_size] [--size small|base|tiny]

Writes DIR/growth.json and a plot of each: pairs/s against texts per image, image size, text length, cross-modal layers
and batch. The prediction is one speed (operations a second), that of the setting all others start from, over the
operations per pair of each setting: where the measured points lie above it, larger products pay.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from bt.bench.case import prepared, seconds
from bt.bench.models import SIZES, Size, make_batch, make_model, make_step, pretraining_objectives
from bt.bench.results import conditions
from bt.bench.work import contrast_targets
from bt.tasks.itc import ITC

GROWTH_SIZES = {"small": Size(width=384, heads=6, image=224), **SIZES}


@dataclass(frozen=True)
class Setting:
    """Of a step. cross_layers 0: two towers with ITC in place of MLM + ITM."""

    texts_per_image: int = 1
    image_size: int = 288
    text_length: int = 15
    cross_layers: int = 6
    batch: int = 4


SERIES: dict[str, Sequence[int]] = {
    "texts_per_image": (1, 2, 4, 6, 8, 10),
    "image_size": (224, 288, 384, 480, 576),
    "text_length": (8, 15, 30, 50, 63),
    "cross_layers": (0, 1, 3, 6, 9, 12),
    "batch": (2, 4, 8, 16),
}
TINY = {"image_size": (32, 64), "text_length": (8, 15), "cross_layers": (0, 1, 2), "batch": (2, 4)}


def speed(size: Size, setting: Setting, repeats: int) -> tuple[float, float]:
    """Pairs/s of a step, and its operations per pair."""
    size = replace(size, image=setting.image_size, cross_layers=setting.cross_layers)
    torch.manual_seed(0)
    batch = make_batch(size, setting.batch, setting.texts_per_image, (setting.text_length, setting.text_length))
    if setting.cross_layers:
        model = make_model(size, pretraining_objectives)
    else:
        model, batch = make_model(size, lambda context: {"itc": ITC(context)}), contrast_targets(batch, "itc")
    step, pairs = make_step(model, batch), setting.batch * setting.texts_per_image
    with prepared(step):
        with FlopCounterMode(display=False) as counter:
            step()
        took = statistics.median(seconds(step) for _ in range(repeats))
    return pairs / took, counter.get_total_flops() / pairs


def measure(size: Size, start: Setting, series: dict[str, Sequence[int]], repeats: int) -> dict[str, Any]:
    reference, operations = speed(size, start, repeats)
    rate = reference * operations
    found: dict[str, Any] = {"operations_a_second": rate, "series": {}}
    for name, values in series.items():
        points = []
        for value in values:
            pairs_a_second, of_pair = speed(size, replace(start, **{name: value}), repeats)
            gc.collect()
            predicted = rate / of_pair
            points.append({name: value, "pairs_per_second": pairs_a_second, "predicted": predicted})
            print(f"{name} {value}: {pairs_a_second:.3g} pairs/s, predicted {predicted:.3g}", flush=True)
        found["series"][name] = points
    return found | {"start": vars(start)} | conditions()


def draw(found: dict[str, Any], folder: Path) -> None:
    for name, points in found["series"].items():
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        values = [point[name] for point in points]
        axes.plot(values, [point["pairs_per_second"] for point in points], "o-", color="#3b6ea5", label="measured")
        axes.plot(values, [point["predicted"] for point in points], "--", color="crimson", label="by operations")
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel("pairs/s")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=110)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default=",".join(SERIES), help=f"of {', '.join(SERIES)}")
    parser.add_argument("--size", choices=list(GROWTH_SIZES), default="base")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(given)
    size, chosen = GROWTH_SIZES[options.size], options.only.split(",")
    if unknown := [name for name in chosen if name not in SERIES]:
        parser.error(f"--only: there is no {unknown[0]!r}; allowed are {', '.join(SERIES)}")
    series = SERIES | (TINY if options.size == "tiny" else {})
    start = replace(Setting(), image_size=size.image, cross_layers=size.cross_layers)
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(size, start, {name: series[name] for name in chosen}, options.repeats)
    (options.out / "growth.json").write_text(json.dumps(found | {"size": options.size}, indent=1) + "\n")
    draw(found, options.out)
