"""Speed against transformers' BridgeTower and the official data pipeline on the same work, as ratios measured side by
side in one run.

python -m bt.bench [--out FILE.json] [--only pretrain_1,inference_20] [--size base|tiny]
python -m bt.bench plan ...   (what a training step needs on how many devices: see --help)
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from bt.bench import plan
from bt.bench.case import Case
from bt.bench.cases import CASES, SIZES
from bt.engine.progress import table

REPETITIONS = 3


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, case: Case) -> dict:
    disagreement = case.disagreement()
    if not disagreement <= case.tolerance:
        raise SystemExit(f"error: {name}: both sides differ by {disagreement:.1e}, more than {case.tolerance:.0e}")
    # In turn, so that a machine that slows down slows both.
    times = [(seconds(case.ours), seconds(case.peer)) for _ in range(REPETITIONS)]
    ratios = [peer / ours for ours, peer in times]
    ours, peer = (case.count / statistics.median(column) for column in zip(*times, strict=True))
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "ours": ours,
        "peer": peer,
        "unit": case.unit,
        "spread": [min(ratios), max(ratios)],
        "loss_difference": disagreement,
    }


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        plan.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m bt.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--only", default=",".join(CASES), help=f"names, comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    for name in chosen:
        if name not in CASES:
            parser.error(f"--only: there is no {name!r}; allowed are {', '.join(CASES)}")
    threads = torch.get_num_threads()
    print(f"{len(chosen)} cases, {threads} threads; at base size about 20 minutes for all on two cores")
    results = []
    for name in chosen:
        description, make = CASES[name]
        torch.manual_seed(0)
        case = make(SIZES[arguments.size])
        torch.set_num_threads(case.threads or threads)
        results.append(measure(name, case))
        del case
        gc.collect()
        print(f"{name}: {description}: {results[-1]['ratio']:.2f} times the peer", flush=True)
    rows = [[r["name"], r["ratio"], r["ours"], r["peer"], r["unit"], r["loss_difference"]] for r in results]
    print("\n" + table(rows, ("case", "ratio", "bt", "peer", "unit", "difference")))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
