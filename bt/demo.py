"""`make demo`: pre-trains and fine-tunes a small BridgeTower on easy-VQA with the ordinary commands, and reports.

    python -m bt.demo [bridge=none] [seed=1] [run_dir=DIR] [...]

key=value settings go to both training runs. run_dir is where the demo's two runs and its report go; by default
runs/demo, with the settings in its name if there are any.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bt.data.shards import ShardSet
from bt.data.transforms import decode

DATA_DIR = Path("data/easy_vqa")
LEAST_ACCURACY = 0.97
BASELINES = Path(__file__).parent / "bench" / "baselines.json"


def run_module(module: str, *arguments: str) -> float:
    """Runs one of the suite's commands as a user would, and returns its seconds; ends the demo if it fails."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status:
        sys.exit(status)
    return time.perf_counter() - start


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def table(rows: list[tuple[str, float, str]]) -> str:
    lines = [f"{'':24s}{'test accuracy':>14s}", "-" * 72]
    lines += [f"{name:24s}{100 * accuracy:12.2f} %  {remark}" for name, accuracy, remark in rows]
    return "\n".join(lines)


def draw_questions(vqa_dir: Path, out: Path, count: int = 12) -> None:
    """Some test questions with image, answer and truth, one an image: wrong answers first."""
    predictions = [json.loads(line) for line in (vqa_dir / "predictions-test.jsonl").read_text().splitlines()]
    wrong = list({p["image"]: p for p in predictions if p["score"] < 1}.values())[: count // 3]
    right = list({p["image"]: p for p in predictions if p["score"] >= 1}.values())
    shown = wrong + right[:: max(1, len(right) // count)][: count - len(wrong)]
    images = ShardSet(str(DATA_DIR), "test")
    rows = {images.key(row): row for row in range(len(images))}
    figure, axes = plt.subplots(3, count // 3, figsize=(11, 9))
    for axis, prediction in zip(axes.flat, shown, strict=False):
        sample = images.read(rows[prediction["image"]])
        axis.imshow(decode(sample.images["image"]).convert("RGB"))
        answer, colour = prediction["answer"], "black"
        if prediction["score"] < 1:
            answer, colour = f"{answer} (true: {prediction['truth']})", "crimson"
        axis.set_title(f"{prediction['question']}\n{answer}", fontsize=8, color=colour)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.demo", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for both training runs; run_dir=DIR: where")
    settings = parser.parse_args().settings
    if any(setting.startswith(("data.dir=", "init_from=", "experiment=")) for setting in settings):
        parser.error("data.dir, init_from and experiment are the demo's own")
    overrides = [setting for setting in settings if not setting.startswith("run_dir=")]
    named = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(["runs/demo", *overrides])).replace("runs-", "runs/", 1)
    root = Path(next((setting.split("=", 1)[1] for setting in settings if setting.startswith("run_dir=")), named))
    pretrain, vqa = root / "pretrain", root / "vqa"
    seconds = {"shards": run_module("bt.convert", "source=easy_vqa", f"out_dir={DATA_DIR}")}
    seconds["pre-training"] = run_module(
        "bt.train", "experiment=easy_vqa_pretrain", f"data.dir={DATA_DIR}", f"run_dir={pretrain}", *overrides
    )
    seconds["fine-tuning and test"] = run_module(
        "bt.train", "experiment=easy_vqa", f"data.dir={DATA_DIR}", f"init_from={pretrain}", f"run_dir={vqa}", *overrides
    )
    report, baselines = load_json(vqa / "report.json"), load_json(BASELINES)
    # Where a run was finished before or went on from a checkpoint, its own count is the longer one.
    for part, run_dir in (("pre-training", pretrain), ("fine-tuning and test", vqa)):
        seconds[part] = max(seconds[part], load_json(run_dir / "report.json")["seconds"])
    accuracy = report["metrics"]["vqa/test/score"]
    draw_questions(vqa, root / "questions.png")
    recorded = f"recorded {baselines['date']}"
    rows = [(name, value, recorded) for name, value in baselines["accuracy"].items()]
    rows.append(("this model", accuracy, f"{sum(seconds.values()):.0f} s, pre-training included"))
    summary = {"accuracy": accuracy, "seconds": seconds, "baselines": baselines, "fine_tuning": report}
    (root / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{table(rows)}\n")
    print("where the time went: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"recorded rows: {baselines['machine']}; measured again by `{baselines['command']}`")
    print(f"written: {root}/report.json, {root}/questions.png, {pretrain}/curves.png, {vqa}/curves.png")
    print(f"every step in MLflow: {Path(sys.executable).parent}/mlflow ui --backend-store-uri sqlite:///mlflow.db")
    if accuracy < LEAST_ACCURACY:
        sys.exit(f"error: test accuracy {100 * accuracy:.2f} % is below {100 * LEAST_ACCURACY:.0f} %")


if __name__ == "__main__":
    main()
