"""Speed against transformers' BridgeTower, the released code's scheme and data pipelines on the same work, as ratios
measured side by side in one run.

python -m bt.bench [--out FILE.json] [--only pretrain_1,inference_20] [--size base|tiny]
python -m bt.bench plan|savings|growth|parts ...   (see the --help of each)
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
from pathlib import Path

import torch

from bt.bench.case import seconds
from bt.bench.cases import CASES
from bt.bench.models import SIZES
from bt.bench.parts import gemm_peak
from bt.bench.results import conditions, draw, shown

# Modules beside this one with a `main` of their own. plan: what a step needs on many devices; savings: what each is
# worth; growth: how cost grows; parts: where a step's time goes.
COMMANDS = ("plan", "savings", "growth", "parts")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        importlib.import_module(f"bt.bench.{sys.argv[1]}").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m bt.bench", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON, and bars beside it as PNG")
    parser.add_argument("--only", default=",".join(CASES), help=f"names, comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    for name in chosen:
        if name not in CASES:
            parser.error(f"--only: there is no {name!r}; allowed are {', '.join(CASES)}")
    threads = torch.get_num_threads()
    minutes = f"about {sum(CASES[name].minutes for name in chosen):.0f} minutes on two cores"
    print(f"{len(chosen)} cases, {threads} threads{'; ' + minutes if arguments.size == 'base' else ''}", flush=True)
    results, peak = [], gemm_peak()
    print(f"large matrix products: {peak / 1e9:.0f} GFLOP/s", flush=True)
    for name in chosen:
        entry = CASES[name]
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        case = entry.make(SIZES[arguments.size])
        torch.set_num_threads(case.threads or threads)
        took = {}
        elapsed = seconds(lambda case=case, name=name, took=took: took.update(case.measure(name, peak)))
        results.append(took | {"work": entry.work, "against": entry.peer, "seconds": elapsed} | conditions())
        del case
        gc.collect()
        print(f"{name}: {entry.work}: {results[-1]['ratio']:.2f} times the peer ({elapsed:.0f} s)", flush=True)
        if arguments.out:  # after each case, so that a run that is stopped leaves what it has
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + shown(results))
    if arguments.out:
        draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
