"""The best members of a sweep, from what their directories hold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt.config.record import read_recorded, what_matters
from bt.errors import DataError

# What tells the rows of the table apart; everything else that differs is what was searched.
RECIPE = ("name", "init_from")


@dataclass(frozen=True)
class Member:
    """A run of a sweep. config: flat, without what does not decide the result. value: its task.metric as its report
    has it; None while it is not finished."""

    config: dict[str, Any]
    value: float | None

    @property
    def recipe(self) -> tuple[Any, ...]:
        return tuple(self.config.get(key) for key in RECIPE)


@dataclass(frozen=True)
class Best:
    """The best settings of one recipe: the searched options with their values. value: their metric, the mean over so
    many seeds. finished, members: runs of the recipe."""

    name: str
    init_from: str | None
    metric: str
    value: float | None
    seeds: int
    settings: dict[str, Any]
    finished: int
    members: int


def read_members(folder: Path) -> list[Member]:
    """The runs in a sweep's directory. DataError where there is none."""
    found = [_member(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    if not found:
        raise DataError(f"{folder} is no directory of a sweep: it holds no run")
    return found


def _member(run_dir: Path) -> Member:
    config, report = what_matters(read_recorded(run_dir)), run_dir / "report.json"
    if not report.is_file():
        return Member(config, None)
    try:
        return Member(config, json.loads(report.read_text())["metrics"].get(config["task.metric"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{report} is no report of a run: {error!r}") from None


def best_of(members: Iterable[Member]) -> list[Best]:
    """For each recipe (`name` and `init_from`) the settings with the best metric; seeds of a setting are averaged, so
    that a lucky one is not chosen."""
    recipes: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        recipes.setdefault(member.recipe, []).append(member)
    return [_best(group) for _, group in sorted(recipes.items(), key=lambda item: [str(part) for part in item[0]])]


def _best(group: list[Member]) -> Best:
    keys = sorted({key for member in group for key in member.config} - {"seed"})
    searched = [key for key in keys if len({json.dumps(member.config.get(key)) for member in group}) > 1]
    values: dict[str, list[float]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for member in group:
        if member.value is not None:
            chosen = {key: member.config.get(key) for key in searched}
            values.setdefault(json.dumps(chosen), []).append(member.value)
            settings[json.dumps(chosen)] = chosen
    config = group[0].config
    means = {setting: statistics.fmean(found) for setting, found in values.items()}
    pick = max if config["task.mode"] == "max" else min
    best = pick(means, key=means.get, default=None)
    return Best(
        config["name"],
        config.get("init_from"),
        config["task.metric"],
        means.get(best),
        len(values.get(best, ())),
        settings.get(best, {}),
        sum(map(len, values.values())),
        len(group),
    )
