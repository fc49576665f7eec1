"""What a sweep would cost, before it is submitted: jobs, GPU hours and disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from bt.assemble import Data, build_model, find_tokenizer, open_shards
from bt.config import Config, read_config
from bt.engine.distributed import World
from bt.engine.progress import table
from bt.errors import UserError
from launchers import local, slurm
from launchers.sweep import Sweep


def plan(
    sweep: Sweep, configs: Mapping[str, Config], overrides: list[list[str]], *, arguments: argparse.Namespace
) -> list[None]:
    """Prints a row per member and the sums; submits and writes nothing."""
    ranks, unit = ranks_of(sweep)
    sizes: dict[str, tuple[int, int]] = {}
    rows, hours, disk = [], 0.0, 0
    for label, cfg in configs.items():
        speed = pairs_per_second(cfg, arguments, ranks)
        shape = json.dumps([asdict(cfg.encoder), cfg.bridge, cfg.cross, asdict(cfg.task)], sort_keys=True, default=str)
        steps, sizes[shape] = measure(cfg, ranks, sizes.get(shape))
        parameters, one = sizes[shape]
        seconds = steps * cfg.global_batch / speed if speed else None
        # The last checkpoints and the best, and the next one while it is written.
        space = (cfg.checkpoint.keep + 2) * one
        disk += space
        hours += 0 if seconds is None else seconds * ranks / 3600
        time = "-" if seconds is None else seconds / 3600
        rows.append((label, ranks, steps, time, f"{parameters:,}", gigabytes(space)))
    print(table(rows, ("member", unit, "steps", "hours", "parameters", "checkpoints")))
    known = (
        f"{hours:.2f} hours of {unit}"
        if all(row[3] != "-" for row in rows)
        else (f"hours of {unit} unknown: give --pairs-per-second or --like RUN_DIR")
    )
    print(f"\n{len(rows)} jobs{at_a_time(sweep)}; {known}; {gigabytes(disk)} for checkpoints")
    return [None] * len(rows)


def ranks_of(sweep: Sweep) -> tuple[int, str]:
    """Ranks of one member, and what each computes on."""
    params = sweep.params()
    if sweep.kind == "local":
        gpus = local.visible_gpus()
        return (params["gpus_per_member"], "GPUs") if gpus else (1, "processes")
    params = slurm.check(params)
    return params["nodes"] * params["tasks_per_node"], "GPUs" if params["gpus_per_node"] else "processes"


def at_a_time(sweep: Sweep) -> str:
    most = sweep.params()["array_parallelism"] if sweep.kind == "slurm" else len(local.slots(sweep.params()))
    return f", at most {most} at a time"


def pairs_per_second(cfg: Config, arguments: argparse.Namespace, ranks: int) -> float | None:
    """Of one member: as given, or as measured by a finished run, in proportion to the ranks."""
    if not arguments.like:
        return arguments.pairs_per_second
    try:
        report = json.loads((Path(arguments.like) / "report.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--like {arguments.like}: no report.json of a finished run there") from error
    if not report.get("pairs_per_second"):
        raise UserError(f"--like {arguments.like}: its report has no pairs_per_second")
    other = read_config(Path(arguments.like))
    if (asdict(other.encoder), other.cross) != (asdict(cfg.encoder), cfg.cross):
        raise UserError(f"--like {arguments.like} has another encoder or cross: it says nothing of this speed")
    return report["pairs_per_second"] / report["world_size"] * ranks


def measure(cfg: Config, ranks: int, known: tuple[int, int] | None) -> tuple[int, tuple[int, int]]:
    """Optimizer steps of a run, and its model's (parameters, bytes of one checkpoint).

    The model is built without memory, on the meta device. known: of a member with the same model.
    """
    shards = open_shards(cfg.data, cfg.data.train_split)
    tokenizer = find_tokenizer(cfg, Path("nowhere"), shards)
    with torch.device("meta"):
        model = build_model(cfg, tokenizer, shards.labels, pretrained=False)
    if known is None:
        count = sum(parameter.numel() for parameter in model.parameters())
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        known = count, weights + 2 * 4 * count  # and AdamW's two moments in fp32
    # Refuses a global batch that does not divide among the ranks.
    train_plan = Data(cfg, World(0, ranks, torch.device("cpu")), model, tokenizer).plan(shards)
    limits = [train_plan.steps(cfg.trainer.epochs)] if cfg.trainer.epochs else []
    return min([*limits, *([cfg.trainer.max_steps] if cfg.trainer.max_steps else [])]), known


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
