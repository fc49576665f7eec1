"""The runs of a sweep, as a tracking store has them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bt.engine.mlflow_store import MEMBER, MEMBERS, PARENT, default_uri, make_client, without_secrets
from bt.errors import DataError

FINISHED = "FINISHED"
MISSING = "missing"
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run of a store.

    member: which member of its sweep, as "bridge=add seed=0". status: MLflow's, or "missing". params: the
    configuration, flat, as text. metrics: the last value of each.
    """

    run_id: str
    member: str
    status: str
    params: dict[str, str] = field(default_factory=dict, repr=False)
    metrics: dict[str, float] = field(default_factory=dict, repr=False)
    tags: dict[str, str] = field(default_factory=dict, repr=False)
    client: Any = field(default=None, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def seed(self) -> str | None:
        return self.params.get("seed") or dict(word.partition("=")[::2] for word in self.member.split()).get("seed")

    @property
    def objective(self) -> str:
        """The metric that chose the best checkpoint."""
        return self.params["task.metric"]

    @property
    def checkpoint(self) -> Path:
        """The directory of the best checkpoint. DataError where the run has not ended with one."""
        if "checkpoint" not in self.tags:
            raise DataError(f"run {self.member or self.run_id} has no checkpoint: it is {self.status.lower()}")
        return Path(self.tags["checkpoint"])

    def curve(self, metric: str) -> Curve:
        """(step, value) of a metric, in order; a step that was logged twice has its last value."""
        points = sorted(self.client.get_metric_history(self.run_id, metric), key=lambda point: point.timestamp)
        return sorted({point.step: point.value for point in points}.items())

    def value(self, metric: str) -> float | None:
        """A metric of the best checkpoint: of the validation split as measured then, of others as measured last."""
        if metric not in self.metrics or "/val/" not in metric:
            return self.metrics.get(metric)
        return dict(self.curve(metric)).get(self.best_step)

    @cached_property
    def best_step(self) -> int | None:
        """The step of the best checkpoint: of the first that no later evaluation was better than."""
        curve = self.curve(self.objective)
        best = max if self.params.get("task.mode", "max") == "max" else min
        return best(curve, key=lambda point: point[1])[0] if curve else None

    def number(self, tag: str) -> float | None:
        """A tag that is a number; None where the run has none yet."""
        value = self.tags.get(tag)
        return None if value in (None, "None") else float(value)


@dataclass(frozen=True)
class Sweep:
    """name: of the sweep's run. runs: one for each member, in the order of the grid; those that are not in the store
    have the status "missing"."""

    name: str
    uri: str
    runs: list[Run]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.finished]

    @property
    def status(self) -> str:
        """ "44 of 45 runs finished; bridge=add seed=2: failed"."""
        left = "".join(f"; {run.member}: {run.status.lower()}" for run in self.unfinished)
        return f"{len(self.runs) - len(self.unfinished)} of {len(self.runs)} runs finished{left}"


def read_sweep(name: str, uri: str | None = None) -> Sweep:
    """The sweep of that name (the last part of its directory), from the store `uri`.

    uri: an MLflow tracking URI; None: as tracking.uri=null. Where the store has several sweeps of the name, the newest.
    Raises DataError where there is none.
    """
    from mlflow.exceptions import MlflowException

    store = default_uri(uri)
    try:
        client = make_client(store, timeout_seconds=60)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        sweeps = _search(client, experiments, "tags.`bt.sweep` = 'true'") if experiments else []
    except (MlflowException, OSError) as error:
        raise DataError(f"{without_secrets(store)} cannot be read: {str(error).splitlines()[0]}") from error
    found = [run for run in sweeps if run.info.run_name == name]
    if not found:
        there = ", ".join(sorted({run.info.run_name for run in sweeps})) or "none"
        raise DataError(f"{without_secrets(store)} has no sweep {name}; it has {there}")
    parent = max(found, key=lambda run: run.info.start_time)
    children = _search(client, experiments, f"tags.`{PARENT}` = '{parent.info.run_id}'")
    return Sweep(name, store, _in_order(json.loads(parent.data.tags.get(MEMBERS, "[]")), children, client))


def _search(client: Any, experiments: list[str], what: str) -> list[Any]:
    """All runs, over all pages."""
    found, token = [], None
    while True:
        page = client.search_runs(experiments, what, max_results=500, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _in_order(named: list[str], children: list[Any], client: Any) -> list[Run]:
    """A run for each member: of several attempts the one that finished, else the last."""
    runs: dict[str, Run] = {}
    for child in sorted(children, key=lambda run: (run.info.status == FINISHED, run.info.start_time)):
        data = child.data
        member = data.tags.get(MEMBER) or child.info.run_id
        runs[member] = Run(child.info.run_id, member, child.info.status, data.params, data.metrics, data.tags, client)
    missing = [Run("", member, MISSING) for member in named if member not in runs]
    place = {member: number for number, member in enumerate(named)}
    return sorted([*runs.values(), *missing], key=lambda run: place.get(run.member, len(place)))
