"""The table of docs/recipes.md, from conf/experiment/: python docs/recipes_table.py writes it anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bt.config import Config, compose_run  # noqa: E402
from bt.smoke import all_experiments  # noqa: E402

PAGE = ROOT / "docs/recipes.md"
MARKS = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = "experiment from model objectives px train→eval tokens pairs lr_base/cross/head decay warm-up length".split()


def composed(name: str) -> Config:
    return compose_run(f"experiment={name}")


def table(recipe: Callable[[str], Config] = composed) -> str:
    """Markdown; experiments that differ in nothing but their data share a row. recipe: configuration by name."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in all_experiments():
        rows.setdefault(row(name, recipe(name)), []).append(name)
    head = [name.replace("_", " ") for name in HEAD]
    lines = [head, ["---"] * len(head)]
    lines += [[", ".join(f"`{name}`" for name in names), *cells] for cells, names in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row(name: str, cfg: Config) -> tuple[str, ...]:
    rates = [cfg.optimizer.lr * factor for factor in (1, cfg.optimizer.cross_multiplier, cfg.optimizer.head_multiplier)]
    transforms = f"{cfg.data.train_transform} → {cfg.data.eval_transform}"
    length = f"{cfg.trainer.epochs:g} epochs" if cfg.trainer.epochs else f"{cfg.trainer.max_steps:,} steps"
    images = cfg.task.texts is None or "glue" not in cfg.task.objectives
    return (
        source(name),
        model(cfg),
        " + ".join(cfg.task.objectives),
        str(cfg.encoder.vision["image_size"]) if images else "",
        transforms if images else "",
        str(cfg.data.max_text_len) if cfg.task.texts else "",
        f"{cfg.global_batch} ({cfg.trainer.micro_batch or 'all'})",
        " / ".join(number(rate) for rate in rates),
        number(cfg.optimizer.weight_decay),
        number(cfg.optimizer.warmup),
        length,
    )


def source(name: str) -> str:
    """The official script or named configuration that the file's first comment names."""
    text = (ROOT / "conf/experiment" / f"{name}.yaml").read_text()
    comment = " ".join(line.lstrip("# ") for line in text.split("defaults:")[0].splitlines()[1:])
    found = re.search(r"[\w-]+\.sh|task_\w+", comment)
    return f"`{found[0]}`" if found else "ours"


def model(cfg: Config) -> str:
    """Size of the cross-modal encoder, and the bridge where it is not the paper's."""
    size = {768: "base", 1024: "large"}.get(cfg.cross["width"], "small")
    bridge = str(cfg.bridge["_target_"]).rpartition(".")[2].removesuffix("Bridge")
    return size if bridge == "Add" else f"{size}, {'METER' if bridge == 'No' else bridge}"


def number(value: float) -> str:
    """As in the configuration files: 1.1e-5, 0.05."""
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


if __name__ == "__main__":
    PAGE.write_text(MARKS.sub(lambda _: table(), PAGE.read_text()))
