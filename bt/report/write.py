"""A comparison as a table for the terminal, Markdown, LaTeX and CSV, and as pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import color_sequences
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bt.engine.progress import table as plain_table
from bt.report.compare import Comparison, Setting
from bt.report.runs import Curve

Cells = list[tuple[str, ...]]
HEADER = ("setting", "mean", "spread", "seeds", "runs")
TESTED = ("difference", "p")
COST = ("parameters (M)", "bridges (M)", "bridges (MFLOP)", "pairs/s", "hours")


def cells(comparison: Comparison, cost: bool = True, digits: int = 4) -> tuple[tuple[str, ...], Cells]:
    """(header, rows) of text. digits: of the metric."""
    tested = comparison.reference is not None
    header = HEADER + (TESTED if tested else ()) + (COST if cost else ())
    return header, [
        _result(setting, digits) + (_test(setting, digits) if tested else ()) + (_cost(setting) if cost else ())
        for setting in comparison.settings
    ]


def _result(setting: Setting, digits: int) -> tuple[str, ...]:
    mark = "" if setting.complete else "*"
    finished = sum(run.finished for run in setting.runs)
    mean = "-" if setting.mean is None else f"{setting.mean:.{digits}f}{mark}"
    runs = f"{finished} of {len(setting.runs)}"
    return setting.name, mean, _shown(setting.spread, digits), str(len(setting.values)), runs


def _test(setting: Setting, digits: int) -> tuple[str, ...]:
    difference = "-" if setting.difference is None else f"{setting.difference:+.{digits}f}"
    return difference, "-" if setting.p is None else f"{setting.p:.3f}"


def _cost(setting: Setting) -> tuple[str, ...]:
    parameters = _scaled(setting.cost("parameters"), 1e6)
    bridges, flops = _scaled(setting.cost("parameters", "bridges"), 1e6), _scaled(setting.cost("flops", "bridges"), 1e6)
    hours = _shown(setting.hours, 3)
    return (
        _shown(parameters, 3),
        _shown(bridges, 3),
        _shown(flops, 2),
        _shown(setting.pairs_per_second, 0),
        hours,
    )


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def as_text(comparison: Comparison, **options: Any) -> str:
    header, rows = cells(comparison, **options)
    return "\n".join([plain_table(rows, header), "", comparison.metric, *comparison.notes])


def as_markdown(comparison: Comparison, **options: Any) -> str:
    header, rows = cells(comparison, **options)
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*shown, "", f"`{comparison.metric}`. " + " ".join(comparison.notes).replace("*", r"\*")]) + "\n"


def as_latex(comparison: Comparison, **options: Any) -> str:
    """A tabular with booktabs' rules."""
    header, rows = cells(comparison, **options)
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (header, *rows)]
    notes = [f"% {line}" for line in (comparison.metric, *comparison.notes)]
    columns = "l" + "r" * (len(header) - 1)
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*notes, *begin, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    for sign in "_%&#":
        text = text.replace(sign, f"\\{sign}")
    return text


def as_csv(comparison: Comparison) -> str:
    """A row for each run, unrounded, so that others can compute with it: finished or not."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("setting", "seed", "status", comparison.metric, "pairs_per_second", "seconds", "run_id"))
    for setting in comparison.settings:
        for run in setting.runs:
            value = setting.values.get(run.seed) if run.finished else None
            numbers = (value, run.number("pairs_per_second"), run.number("seconds"))
            shown = ["" if number is None else repr(number) for number in numbers]
            writer.writerow((setting.name, run.seed or "", run.status.lower(), *shown, run.run_id))
    return out.getvalue()


class Picture(Figure):
    """A matplotlib figure that sends nothing to a display, and that a notebook shows."""

    def __init__(self, width: float = 7.0, height: float = 4.0):
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=110)
        return out.getvalue()


def draw_means(comparison: Comparison) -> Picture:
    """Every seed as a point, the mean as a bar across them; settings that are not complete are hollow."""
    shown = [setting for setting in comparison.settings if setting.values]
    made = Picture(7.0, 1.2 + 0.32 * len(shown))
    axes = made.subplots()
    for row, setting in enumerate(shown):
        values = list(setting.values.values())
        face = "tab:blue" if setting.complete else "none"
        axes.scatter(values, [row] * len(values), s=28, facecolors=face, edgecolors="tab:blue")
        axes.plot([setting.mean] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2)
    axes.set_yticks(range(len(shown)), [setting.name for setting in shown])
    axes.invert_yaxis()
    axes.set_xlabel(comparison.metric)
    axes.grid(alpha=0.3)
    return made


def draw_cost(comparison: Comparison, kind: str = "pairs_per_second") -> Picture:
    """The metric (mean and spread) over the cost. kind: pairs_per_second, hours, or parameters or flops of bridges."""
    made = Picture()
    axes = made.subplots()
    for setting in comparison.settings:
        x = setting.cost(kind, "bridges") if kind in ("parameters", "flops") else getattr(setting, kind)
        if x is not None and setting.mean is not None:
            axes.errorbar(x, setting.mean, yerr=setting.spread or 0, fmt="o", capsize=3)
            axes.annotate(setting.name, (x, setting.mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel=f"{kind} of bridges" if kind in ("parameters", "flops") else kind, ylabel=comparison.metric)
    axes.grid(alpha=0.3)
    return made


def draw_over(comparison: Comparison, option: str) -> Picture:
    """The metric (mean and spread) over a swept option with numbers; a line for each setting of the other options."""
    lines: dict[str, list[tuple[float, Setting]]] = {}
    for setting in comparison.settings:
        words = setting.name.split()
        (value,) = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
        rest = " ".join(word for word in words if not word.startswith(f"{option}="))
        if setting.mean is not None:
            lines.setdefault(rest, []).append((float(value), setting))
    made = Picture()
    axes = made.subplots()
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        means, spreads = [one.mean for _, one in points], [one.spread or 0 for _, one in points]
        axes.errorbar([x for x, _ in points], means, yerr=spreads, label=name or "all", marker="o", capsize=3)
    axes.set(xlabel=option, ylabel=comparison.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return made


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, greatest) over runs, at the steps that all of them have."""
    by_run = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    at = [(step, [curve[step] for curve in by_run]) for step in steps]
    return [(step, sum(values) / len(values), min(values), max(values)) for step, values in at]


def draw_curves(comparison: Comparison, metric: str, settings: Sequence[str] | None = None) -> Picture:
    """Learning curves: the mean over seeds, with the range between the least and the greatest."""
    made = Picture(8.0, 4.4)
    axes = made.subplots()
    axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=color_sequences["tab10"]))
    for setting in comparison.settings:
        if settings is not None and setting.name not in settings:
            continue
        points = mean_curve([run.curve(metric) for run in setting.runs if run.finished])
        if points:
            steps, means, least, most = zip(*points, strict=True)
            (line,) = axes.plot(
                steps, means, label=setting.name, marker="o" if len(points) < 15 else None, markersize=3
            )
            axes.fill_between(steps, least, most, alpha=0.15, color=line.get_color())
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return made


def export(comparison: Comparison, folder: Path, stem: str | None = None) -> list[Path]:
    """Writes STEM.md, .tex, .csv and .png into a folder, which is made; returns their paths."""
    folder, stem = Path(folder), stem or comparison.sweep.name
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"md": as_markdown(comparison), "tex": as_latex(comparison), "csv": as_csv(comparison)}
    paths = [folder / f"{stem}.{ending}" for ending in (*texts, "png")]
    for path, text in zip(paths, texts.values(), strict=False):
        path.write_text(text)
    draw_means(comparison).savefig(paths[-1], dpi=150)
    return paths
