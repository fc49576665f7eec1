"""What each saving is worth: a pre-training step in the released scheme, and one saving after the other on top.

python -m bt.bench savings [--images 4] [--texts-per-image 1] [--rounds 3] [--size base|tiny] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bt.bench.case import prepared, seconds
from bt.bench.models import SIZES, Size, make_batch, make_model, pretraining_objectives
from bt.bench.official import make_scheme_step, savings
from bt.bench.results import conditions
from bt.engine.progress import table

WORDS = {
    "released scheme": "released scheme",
    "apart": "one pass of the encoders for all objectives",
    "padded": "texts padded to the longest of the batch",
    "every_position": "MLM head on masked positions alone",
    "whole_layers": "last cross-modal layer only where it is read",
    "expanded": "expanded to pairs late, first layer's part per input once",
    "projected": "products in the cheapest order",
    "formulas": "SDPA, activation that keeps its input alone",
}


def measure(size: Size, images: int, texts_per_image: int, rounds: int) -> list[dict[str, Any]]:
    """Every scheme in turn, `rounds` times after a warm-up; all share a model, whose losses are compared first."""
    torch.manual_seed(0)
    model = make_model(size, pretraining_objectives)
    batch = make_batch(size, images, texts_per_image, false_images=texts_per_image == 1)
    found, results = [], []
    steps = {name: make_scheme_step(model, batch, scheme, size.max_tokens) for name, scheme in savings()}
    for name, step in steps.items():
        with prepared(step), FlopCounterMode(display=False) as counter:
            losses = step()
        found.append(losses)
        results.append({"name": name, "saving": WORDS[name], "gflop": counter.get_total_flops() / 1e9, "seconds": []})
        if not torch.allclose(losses, found[0], rtol=1e-4):
            raise SystemExit(f"error: {name} gives {losses.tolist()}, the released scheme {found[0].tolist()}")
    for _ in range(rounds):
        for result, step in zip(results, steps.values(), strict=True):
            with prepared(step):
                result["seconds"].append(seconds(step))
    for result in results:
        result["seconds"] = statistics.median(result["seconds"])
    return results


def shown(results: list[dict[str, Any]]) -> str:
    whole, rows = results[0]["seconds"], []
    for before, result in zip([results[0], *results], results, strict=False):
        gained = before["seconds"] / result["seconds"]
        rows.append([result["saving"], result["seconds"], gained, whole / result["seconds"], result["gflop"]])
    return table(rows, ("on top of the lines above", "seconds a step", "faster by", "in all", "GFLOP"))


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench savings", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--texts-per-image", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(given)
    results = measure(SIZES[options.size], options.images, options.texts_per_image, options.rounds)
    print(shown(results))
    if options.out:
        what = {"images": options.images, "texts_per_image": options.texts_per_image, "size": options.size}
        options.out.write_text(json.dumps({"results": results, **what, **conditions()}, indent=1) + "\n")
