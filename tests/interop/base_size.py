"""Time and memory of imports and exports at base size, on random weights, and that they come back bit for bit.

python -m tests.interop.base_size DIR     # about 6 GB in DIR, a minute of one core
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bt.engine.progress import table
from bt.interop.export_released import export_released
from bt.interop.folder import Bundle, build
from bt.interop.source import open_source
from tests.interop.models import nodes, randomise

BASE = {
    "encoder__vision__image_size": 288,
    "encoder__vision__architecture": {
        "width": 768,
        "layers": 12,
        "patch_size": 16,
        "head_width": 64,
        "quick_gelu": True,
    },
    "encoder__text__config": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
    "cross__width": 768,
    "cross__heads": 12,
    "cross__layers": 6,
    "cross__ffn_ratio": 4,
}


def measured(*arguments: object) -> tuple[float, float]:
    """Seconds and the largest resident memory (GB) of a `bt.checkpoint` command; memory mapped from files counts."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "bt.checkpoint", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, arguments))} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1e6


def main(root: Path) -> None:
    torch.manual_seed(0)
    made = Bundle(nodes(**BASE), {}, source="random weights of base size")
    model = build(made)
    randomise(model)
    made.state = model.state_dict()
    export_released(made, root / "base.ckpt")
    size = (root / "base.ckpt").stat().st_size / 1e9
    steps = {
        "import of the released code's file": ("import", root / "base.ckpt", "--out", root / "one"),
        "export for the released code": ("export", root / "one", "--format", "official", "--out", root / "back.ckpt"),
        "export for transformers": ("export", root / "one", "--format", "hf", "--out", root / "hf"),
        "import of transformers' folder": ("import", root / "hf", "--out", root / "two"),
    }
    rows = [(name, *measured(*arguments)) for name, arguments in steps.items()]
    print(table(rows, (f"random weights, {size:.2f} GB", "seconds", "GB at most")))
    first, second = open_source(root / "base.ckpt").tensors, open_source(root / "back.ckpt").tensors
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    first, second = (open_source(root / name).tensors for name in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    print("both ways bit for bit")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
