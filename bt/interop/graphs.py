"""The tower's three calls as graphs for other runtimes: ONNX files, or programs of torch.export.

encode_images: images (I, C, H, W) float, normalised; types (I,) int64, rows of the type table (1; 2 for the second
image of a pair) -> states (N, I, S, D), cls (I, uni-modal width).
encode_texts: ids (T, L) int64, mask (T, L) bool, True at real tokens -> states (N, T, L, D), cls.
fuse: image_states, text_states, text_mask, pairs (P, 2) int64 -> cls (P, 2 D), text (P, L, D), image (P, S, D).
N, the states that the bridge of a modality reads, S, D and the image size are fixed, the numbers of images, texts,
tokens and pairs are free. tower.json beside them says the sizes and how images are normalised.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bt.data.batch import Texts
from bt.errors import CheckpointError
from bt.interop.folder import Bundle, build, new_folder
from bt.interop.imports import Row
from bt.models.bridgetower import BridgeTower, Encoded, Need
from bt.models.cross_modal import set_folding
from bt.models.quick_gelu import use_formula

# Largest difference of an output, over the output's own largest value, that passes for rounding.
TOLERANCE = 1e-4
# ONNX files (protocol buffers) end at 2 GiB; larger weights lie in a file beside.
LARGEST_ONNX = 1_900_000_000


class _OfTower(nn.Module):
    """One of the tower's calls as a module of its own. outputs: their names."""

    outputs: tuple[str, ...]

    def __init__(self, tower: BridgeTower):
        super().__init__()
        self.tower = tower


class EncodeImages(_OfTower):
    outputs = ("states", "cls")

    def forward(self, images: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.tower.encode_images(images, types)
        return torch.stack(encoded.states), encoded.cls


class EncodeTexts(_OfTower):
    outputs = ("states", "cls")

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.tower.encode_texts(Texts(ids, mask))
        return torch.stack(encoded.states), encoded.cls


class Fuse(_OfTower):
    outputs = ("cls", "text", "image")

    def forward(
        self, image_states: Tensor, text_states: Tensor, text_mask: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # `fuse` asks the [CLS] of the encoders for their number alone.
        images = Encoded([*image_states.unbind(0)], image_states[-1, :, 0])
        texts = Encoded([*text_states.unbind(0)], text_states[-1, :, 0], text_mask)
        fused = self.tower.fuse(images, texts, pairs, Need(cls=True, text=True, image=True))
        return fused.cls, fused.text, fused.image


@dataclass
class Call:
    """name: of the file. inputs: to trace with, by name; others: of other sizes, to compare with. free: the dimensions
    of each input that are not fixed. strict: how torch.export traces it."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    others: list[dict[str, Tensor]]
    free: dict[str, dict[int, Any]]
    strict: bool = False


@torch.no_grad()
def calls(tower: BridgeTower) -> list[Call]:
    if tower.cross.layers == 0:
        raise CheckpointError("cross.layers=0: there is nothing to fuse, and no graph of it")
    image, text, fuse = EncodeImages(tower), EncodeTexts(tower), Fuse(tower)
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> dict[str, Tensor]:
        size = (count, tower.vision.input_channels, tower.vision.image_size, tower.vision.image_size)
        return {"images": torch.randn(size, generator=generator), "types": torch.ones(count, dtype=torch.int64)}

    def texts(count: int, tokens: int) -> dict[str, Tensor]:
        tokens = min(tokens, tower.text.max_positions)
        ids = torch.randint(5, tower.text.vocab_size, (count, tokens), generator=generator)
        mask = torch.arange(tokens) < torch.arange(tokens, tokens - count, -1)[:, None].clamp(min=2)
        return {"ids": ids.masked_fill(~mask, tower.text.pad_id or 0), "mask": mask}

    def pairs(of_images: dict[str, Tensor], of_texts: dict[str, Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
        return {
            "image_states": image(**of_images)[0],
            "text_states": text(**of_texts)[0],
            "text_mask": of_texts["mask"],
            "pairs": torch.tensor(rows),
        }

    seen = images(3), texts(4, 9), [[0, 0], [1, 1], [2, 3], [0, 2], [2, 2]]
    # One of each is what a tracer likes to take for a special case.
    others = (images(2), texts(3, 12), [[0, 2], [1, 0], [1, 1], [0, 0]]), (images(1), texts(1, 5), [[0, 0]])
    dynamic = Dim.DYNAMIC
    free_images = {"images": {0: dynamic}, "types": {0: dynamic}}
    free_texts = {"ids": {0: dynamic, 1: dynamic}, "mask": {0: dynamic, 1: dynamic}}
    free_pairs = {
        "image_states": {1: dynamic},
        "text_states": {1: dynamic, 2: dynamic},
        "text_mask": {0: dynamic, 1: dynamic},
        "pairs": {0: dynamic},
    }
    return [
        Call("encode_images", image, seen[0], [other[0] for other in others], free_images),
        Call("encode_texts", text, seen[1], [other[1] for other in others], free_texts),
        # Traced otherwise, the numbers of images and texts become constants.
        Call("fuse", fuse, pairs(*seen), [pairs(*other) for other in others], free_pairs, strict=True),
    ]


def export_graphs(bundle: Bundle, out: Path, kind: str) -> list[Row]:
    """Writes the three calls and compares each file, read back, with the model on inputs of other sizes.

    kind: onnx or torch_export. Raises CheckpointError where packages are missing or a file's outputs differ.
    """
    if kind == "onnx":
        _need_onnx()
    model = build(bundle)
    model.load_state_dict(bundle.state)
    model = model.float().eval()
    traceable(model.tower)
    rows = []
    with new_folder(out) as folder, torch.no_grad():
        for call in calls(model.tower):
            program = trace(call)
            if kind == "onnx":
                path = _write_onnx(call, program, folder)
                run = _onnx_runner(path)
            else:
                path = folder / f"{call.name}.pt2"
                torch.export.save(program, path)
                run = torch.export.load(path).module()
            worst = max(_compare(call, inputs, run(**inputs)) for inputs in call.others)
            rows.append(Row("written", path.name, 0, 0, f"largest difference from the model {worst:.1e} (relative)"))
        (folder / "tower.json").write_text(json.dumps(describe(bundle, model.tower), indent=1) + "\n")
        if bundle.tokenizer is not None:
            bundle.tokenizer.save(folder / "tokenizer.json")
    return rows


def traceable(tower: BridgeTower) -> None:
    """Takes out what is fast in eager mode alone: orders of products that the sizes of a batch choose, of which a
    graph would hold one, and an activation with a gradient of its own."""
    set_folding(tower, False)
    use_formula(tower)


def trace(call: Call) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the traced libraries do beside their outputs
            return torch.export.export(call.module, (), call.inputs, dynamic_shapes=call.free, strict=call.strict)
    except Exception as error:
        raise CheckpointError(f"{call.name} cannot be traced: {str(error).splitlines()[0]}") from error


def describe(bundle: Bundle, tower: BridgeTower) -> dict[str, Any]:
    """What a user of the graphs must know beside them."""
    vision, data = tower.vision, bundle.nodes.get("data", {})
    return {
        "source": bundle.source,
        "image_size": vision.image_size,
        "channels": vision.input_channels,
        "mean": list(vision.mean),
        "std": list(vision.std),
        "transform": data.get("eval_transform", "clip"),
        "max_text_len": min(data.get("max_text_len", 50), tower.text.max_positions),
        "pad_id": tower.text.pad_id,
        "width": tower.width,
        "image_states": len(tower.image_layers),
        "text_states": len(tower.text_layers),
    }


def _compare(call: Call, inputs: dict[str, Tensor], found: tuple[Tensor, ...]) -> float:
    """The largest relative difference of the outputs. Raises CheckpointError where it is no rounding."""
    worst = 0.0
    for name, own, other in zip(call.module.outputs, call.module(**inputs), found, strict=True):
        difference = (own - other).abs().max().item() / max(own.abs().max().item(), 1e-12)
        if not difference <= TOLERANCE:
            raise CheckpointError(f"{call.name}: its {name} differs from the model's by {difference:.1e} (relative)")
        worst = max(worst, difference)
    return worst


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"--format onnx needs {error.name}: pip install 'bt[onnx]'") from error


def _write_onnx(call: Call, program: ExportedProgram, folder: Path) -> Path:
    path = folder / f"{call.name}.onnx"
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    written = torch.onnx.export(program, input_names=[*call.inputs], output_names=call.module.outputs, verbose=False)
    written.save(path, external_data=size > LARGEST_ONNX)
    return path


def _onnx_runner(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return tuple(torch.from_numpy(array) for array in session.run(None, arrays))

    return run
