"""Where a pre-training step's time goes: a roofline table by part of the model, and the data.

python -m bt.bench parts [--images 4] [--texts-per-image 1] [--size base|tiny] [--out FILE.json]

Each part runs forward and backward by itself, on inputs as in the step. Its roofline is the larger of operations over
the speed of a large matrix product and bytes over the speed of a large copy. Bytes: weights read twice and their
gradients written, and what autograd keeps written and read; of AdamW, seven numbers for each weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bt.bench.case import kept_by_autograd, seconds
from bt.bench.data_cases import IMAGES, ImageFolderCSV, convert, from_shards, make_photos
from bt.bench.models import SIZES, Size, make_batch, make_model, pretraining_objectives
from bt.bench.results import conditions
from bt.data.batch import Texts
from bt.engine.progress import table
from bt.models.bridgetower import Encoded, Need

REPEATS = 3


def gemm_peak(size: int = 2048) -> float:
    """Floating-point operations a second of a large fp32 matrix product, the best of a few."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(8))


def copy_speed(size: int = 2**26) -> float:
    """Bytes read and written a second by a copy that fits no cache, the best of a few."""
    a, b = torch.zeros(size), torch.zeros(size)
    return 8 * size / min(seconds(lambda: b.copy_(a)) for _ in range(5))


def detached(encoded: Encoded) -> Encoded:
    return Encoded([state.detach().requires_grad_() for state in encoded.states], encoded.cls.detach(), encoded.mask)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.full_like(output, 1e-4) for output in outputs])


def parts_of(size: Size, images: int, texts_per_image: int) -> dict[str, tuple[Callable[[], Any], list[nn.Module]]]:
    """What each part does in a step, and the modules whose weights it reads."""
    model = make_model(size, pretraining_objectives)
    tower, (mlm, itm) = model.tower, model.objectives.values()
    batch = make_batch(size, images, texts_per_image)
    of_mlm, of_itm = batch.targets["mlm"], batch.targets["itm"]
    both = Texts(torch.cat([batch.texts.ids, of_mlm["ids"]]), torch.cat([batch.texts.mask, of_mlm["mask"]]))
    encoded_images = detached(tower.encode_images(batch.images))
    encoded_texts, encoded_masked = map(
        detached, tower.encode_texts(both).split([len(batch.texts.ids), len(of_mlm["ids"])])
    )
    mlm_need, itm_need = Need(text=of_mlm["positions"]), Need(cls=True)

    def fuse() -> list[Tensor]:
        # New ones, since what passes share is kept in them with its graph.
        of_images, of_masked, of_texts = (
            replace(encoded, entered=None) for encoded in (encoded_images, encoded_masked, encoded_texts)
        )
        return [
            tower.fuse(of_images, of_masked, batch.pairs, mlm_need).text,
            tower.fuse(of_images, of_texts, of_itm["pairs"], itm_need).cls,
        ]

    fused_text, fused_cls = (output.detach().requires_grad_() for output in fuse())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    encoders = {"vision": tower.vision, "text": tower.text}
    crossing = [m for name, m in tower.named_children() if name not in (*encoders, "type_embeddings")]
    return {
        "vision": (lambda: backward(*tower.encode_images(batch.images).states), [tower.vision]),
        "text": (lambda: backward(*tower.encode_texts(both).states), [tower.text]),
        "cross": (lambda: backward(*fuse()), [*crossing, *crossing]),
        "heads": (lambda: backward(mlm.head(fused_text), itm.head(fused_cls)), [mlm, itm]),
        "optimizer": (optimizer.step, [model]),
    }


def loading(size: Size) -> float:
    """Seconds to read, decode and normalise an image in one loader process."""
    with TemporaryDirectory(prefix="bt-bench-") as folder:
        make_photos(Path(folder))
        convert(ImageFolderCSV(folder), Path(folder) / "shards")
        load = from_shards(Path(folder), size.image, "fast", "blip_randaug")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        load()
        took = seconds(load) / IMAGES
        torch.set_num_threads(threads)
    return took


def measure(size: Size, images: int, texts_per_image: int) -> dict[str, Any]:
    torch.manual_seed(0)
    peak, bandwidth = gemm_peak(), copy_speed()
    rows = []
    for name, (work, modules) in parts_of(size, images, texts_per_image).items():
        parameters = [parameter for module in modules for parameter in module.parameters()]
        weights = 4 * sum(parameter.numel() for parameter in parameters)
        with FlopCounterMode(display=False) as counter, kept_by_autograd(parameters) as kept:
            work()
        moved = 7 * weights if name == "optimizer" else 3 * weights + 2 * sum(kept.values())
        took = min(seconds(work) for _ in range(REPEATS))
        flops = counter.get_total_flops()
        bound = max(flops / peak, moved / bandwidth)
        rows.append(
            {
                "part": name,
                "seconds": took,
                "gflop": flops / 1e9,
                "gb": moved / 1e9,
                "gflops": flops / took / 1e9,
                "bound": "compute" if flops / peak > moved / bandwidth else "memory",
                "roofline_share": bound / took,
            }
        )
    result = {"parts": rows, "gemm_peak": peak, "copy_speed": bandwidth, "loading_seconds_per_image": loading(size)}
    return result | {"images": images, "texts_per_image": texts_per_image} | conditions()


def shown(result: dict[str, Any]) -> str:
    whole = sum(row["seconds"] for row in result["parts"])
    rows = [
        [
            row["part"],
            row["seconds"],
            f"{100 * row['seconds'] / whole:.0f} %",
            row["gflop"],
            row["gb"],
            row["gflops"],
            row["bound"],
            f"{100 * row['roofline_share']:.0f} %",
        ]
        for row in result["parts"]
    ]
    flops = sum(row["gflop"] for row in result["parts"])
    data = result["loading_seconds_per_image"]
    return "\n".join(
        [
            table(rows, ("part", "seconds", "of the step", "GFLOP", "GB", "GFLOP/s", "bound by", "of its roofline")),
            f"\nlarge matrix product {result['gemm_peak'] / 1e9:.0f} GFLOP/s, "
            f"copy {result['copy_speed'] / 1e9:.0f} GB/s",
            f"all parts: {whole:.2f} s, {100 * flops * 1e9 / whole / result['gemm_peak']:.0f} % of the matrix product",
            f"data: {1000 * data:.1f} ms an image in one loader process, {data * result['images']:.3f} s a step",
        ]
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench parts", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--texts-per-image", type=int, default=1)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(given)
    result = measure(SIZES[options.size], options.images, options.texts_per_image)
    print(shown(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
