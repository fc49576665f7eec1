"""A sweep's settings side by side: mean and spread over seeds, what is missing, significance, and the cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from bt.engine.cost import PARTS
from bt.errors import DataError
from bt.report.runs import Run, Sweep

LEAST_PAIRS = 3  # seeds that a paired test takes at least


@dataclass(frozen=True)
class Setting:
    """The runs of a sweep that differ in their seed alone.

    name: what they have in common and others have not, as "bridge=add". values: the metric by seed, of those that
    finished. p: of a paired t-test over seeds against the reference, corrected for the number of settings compared
    (Holm); None where there is none, and `note` says why.
    """

    name: str
    runs: list[Run] = field(repr=False)
    values: dict[str, float]
    difference: float | None = None
    p: float | None = None
    note: str = ""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (of a sample); None for less than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def complete(self) -> bool:
        return all(run.finished for run in self.runs)

    def median(self, number: Callable[[Run], float | None]) -> float | None:
        found = [value for run in self.runs if run.finished and (value := number(run)) is not None]
        return statistics.median(found) if found else None

    @property
    def pairs_per_second(self) -> float | None:
        return self.median(lambda run: run.number("pairs_per_second"))

    @property
    def hours(self) -> float | None:
        """Of all its finished runs together: hours of a GPU, or of a core on CPUs."""
        found = [device_hours(run) for run in self.runs if run.finished]
        return None if not found or None in found else sum(found)

    def cost(self, kind: str, part: str | None = None) -> float | None:
        """kind: parameters or flops; part: of bt.engine.cost.PARTS, None for all of them."""
        parts = PARTS if part is None else (part,)
        found = [self.median(lambda run, part=part: run.number(f"cost.{kind}.{part}")) for part in parts]
        return None if None in found else sum(found)


@dataclass(frozen=True)
class Comparison:
    """metric: what is compared. reference: the setting that the others are tested against; None: no test."""

    sweep: Sweep
    metric: str
    settings: list[Setting]
    reference: str | None = None

    def __getitem__(self, name: str) -> Setting:
        return next(setting for setting in self.settings if setting.name == name)

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers has to know: what is missing, and how it was tested."""
        lines = [f"{self.sweep.status}."]
        if self.sweep.unfinished:
            lines.append("A mean marked * is over the runs that finished alone.")
        devices = {run.tags.get("device_type") for run in self.sweep.runs if run.finished}
        unit = "GPU" if devices == {"cuda"} else "core"
        lines.append(f"Spread: standard deviation over seeds. Hours: of one {unit}, the setting's runs together.")
        if self.reference is not None:
            tested = [setting for setting in self.settings if setting.p is not None]
            lines.append(
                f"Differences to {self.reference} over the seeds that both have."
                + (" p: two-sided paired t-test, Holm's correction." if tested else "")
            )
            lines += sorted({f"{setting.name}: {setting.note}." for setting in self.settings if setting.note})
        return lines


def device_hours(run: Run) -> float | None:
    seconds = run.number("seconds")
    if seconds is None:
        return None
    ranks = run.number("world_size") or 1
    cores = 1 if run.tags.get("device_type") == "cuda" else run.number("threads") or 1
    return seconds * ranks * cores / 3600


def name_of(run: Run, common: Iterable[str]) -> str:
    """What the run has beside its seed that not all runs of the sweep have."""
    words = [word for word in run.member.split() if word not in common and not word.startswith("seed=")]
    return " ".join(words) or "all"


def compare(sweep: Sweep, metric: str | None = None, against: str | None = None) -> Comparison:
    """The settings of a sweep, in its order.

    metric: name as in MLflow, such as vqa/test/score; None: what chose the best checkpoint. against: name of the
    setting to test the others against. Raises DataError where no run has the metric, or there is no such setting.
    """
    if metric is None:
        metrics = {run.objective for run in sweep.runs if "task.metric" in run.params}
        if len(metrics) != 1:
            raise DataError(f"sweep {sweep.name} has {len(metrics)} objective metrics: name one")
        metric = metrics.pop()
    words = [set(run.member.split()) for run in sweep.runs]
    common = set.intersection(*words) if len(words) > 1 else set()
    groups: dict[str, list[Run]] = {}
    for run in sweep.runs:
        groups.setdefault(name_of(run, common), []).append(run)
    settings = [Setting(name, runs, _values(runs, metric)) for name, runs in groups.items()]
    if not any(setting.values for setting in settings) and any(run.finished for run in sweep.runs):
        known = sorted({key for run in sweep.runs for key in run.metrics if key.count("/") == 2})
        raise DataError(f"no finished run of sweep {sweep.name} has {metric}; they have {', '.join(known)}")
    if against is not None:
        if against not in groups:
            raise DataError(f"sweep {sweep.name} has no setting {against}; it has {', '.join(groups)}")
        settings = _tested(settings, next(setting for setting in settings if setting.name == against))
    return Comparison(sweep, metric, settings, against)


def _values(runs: Sequence[Run], metric: str) -> dict[str, float]:
    found = {run.seed or str(number): run.value(metric) for number, run in enumerate(runs) if run.finished}
    return {seed: value for seed, value in found.items() if value is not None}


def _tested(settings: list[Setting], reference: Setting) -> list[Setting]:
    """The settings with their differences to the reference and p, as far as the seeds allow."""
    made, raw = [], {}
    for setting in settings:
        pairs = [(setting.values[seed], reference.values[seed]) for seed in setting.values if seed in reference.values]
        difference, note = None, ""
        if setting is not reference:
            difference = statistics.fmean(a - b for a, b in pairs) if pairs else None
            if len(pairs) < LEAST_PAIRS:
                note = f"too few seeds for a test ({len(pairs)}, it takes {LEAST_PAIRS})"
            elif len({a - b for a, b in pairs}) == 1:
                note = "no spread of the differences to test against"
            else:
                raw[setting.name] = paired_t_test(pairs)
        made.append(replace(setting, difference=difference, note=note))
    corrected = holm(raw)
    return [replace(one, p=corrected.get(one.name)) for one in made]


def paired_t_test(pairs: Sequence[tuple[float, float]]) -> float:
    """Two-sided p of the hypothesis that the mean difference is 0."""
    from scipy.stats import ttest_rel

    return float(ttest_rel(*zip(*pairs, strict=True)).pvalue)


def holm(values: dict[str, float]) -> dict[str, float]:
    """p-values by name, corrected for their number (Holm 1979)."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(values, key=values.get)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[name]))
        corrected[name] = largest
    return corrected
