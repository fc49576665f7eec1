"""What the benchmark's JSON says, as a table, as bars, and as the README's table.

python -m bt.bench.results FILE.json [...] --readme README.md   (writes the table between its two marks)
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bt.bench.baselines import processor
from bt.engine.progress import table

START, END = "<!-- speed table: python -m bt.bench.results -->", "<!-- end of the speed table -->"


@functools.cache
def conditions() -> dict[str, str]:
    """When and where a result was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def shown(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [r["name"], r["ratio"], *(f"{end:.2f}" for end in r["spread"]), r["ours"], r["peer"], r["unit"], _share(r),
         f"{r['loss_difference']:.0e}"]
        for r in results
    ]  # fmt: skip
    return table(rows, ("case", "ratio", "from", "to", "bt", "peer", "unit", "of GEMM peak", "difference"))


def _share(result: Mapping[str, Any]) -> str:
    shares = result.get("gemm_share")
    return f"{100 * shares[0]:.0f} %, {100 * shares[1]:.0f} %" if shares else ""


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the ratios, with their spread."""
    figure = Figure(figsize=(8, 0.4 * len(results) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, result in enumerate(results):
        ratio, (low, high) = result["ratio"], result["spread"]
        axes.barh(place, ratio, color="#3b6ea5", height=0.6, xerr=[[ratio - low], [high - ratio]])
        axes.text(high + 0.05, place, f"{ratio:.2f}", va="center")
    axes.axvline(1, color="crimson", linewidth=1)
    axes.set_yticks(range(len(results)), [f"{r['name']} ({r['against']})" for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("times the peer")
    figure.savefig(path, dpi=110)


def readme_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row a case, and under what conditions they were measured."""
    lines = ["| case | work | against | `bt` : peer | `bt` | peer |", "|---|---|---|---|---|---|"]
    for r in results:
        values = (f"{r[side]:.3g} {r['unit']}" for side in ("ours", "peer"))
        lines.append(f"| `{r['name']}` | {r['work']} | {r['against']} | {r['ratio']:.2f} | {' | '.join(values)} |")
    where = dict.fromkeys(f"{r['machine']}, {r['versions']}, {r['date']}" for r in results)
    return "\n".join([*lines, "", f"({'; '.join(where)}; `make bench`)"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench.results", description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="of `python -m bt.bench --out`; a later one counts")
    parser.add_argument("--readme", type=Path, help="write the table there")
    arguments = parser.parse_args()
    found = {result["name"]: result for file in arguments.files for result in json.loads(file.read_text())}
    text = readme_table(list(found.values()))
    if arguments.readme is None:
        print(text)
        return
    before, start, rest = arguments.readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        parser.error(f"{arguments.readme} lacks the marks {START} and {END}")
    arguments.readme.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
