"""`make tasks-report`: every task trained with small encoders on pictures that packages ship, against baselines that do
not look at both modalities.

Raw trees of icons in the official formats (bt.samples) -> shards -> pre-training -> each task's experiment with
trainer=small. A run that is finished is not repeated, so the same command goes on where it was stopped. Writes
OUT/report.json, report.md and report.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bt.data.decode import decode
from bt.data.shards import ShardSet
from bt.data.write import convert
from bt.engine.progress import duration
from bt.samples.offline import source_of

SIDE = 16  # pixels of a side to which pictures are shrunk before they are compared
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


@dataclass(frozen=True)
class Trial:
    """A task to train. source: shards of this name (bt.convert). metric: of report.json. overrides: of bt.train, beside
    those of all. texts: the field of the labelled entries, "" for labelled images; None where baselines by label make
    no sense, and `chance` is given. split: where the metric is measured, for the baselines."""

    name: str
    experiment: str
    source: str
    metric: str
    overrides: tuple[str, ...] = ()
    texts: str | None = None
    split: str = "test"
    chance: float | None = None


PRETRAINING = Trial(
    "pre-training: ITM accuracy",
    "pretrain_base",
    "coco_karpathy",
    "itm/test/accuracy",
    (
        "task=pretrain_itc",
        "task.objectives.itm.negatives=batch",
        "trainer.epochs=3",
        "eval.every_epochs=1",
        "eval.test=true",
        "data.dir={data}",
        "data.train_split=[train,restval]",
    ),
    chance=0.5,
)
FEW = "eval.max_samples=100"  # images of the retrieval evaluations, with 500 captions: at random R@K is K / 100 or less
TRIALS = (
    Trial(
        "VQA: score on val",
        "vqa_base",
        "vqav2",
        "vqa/val/score",
        ("data.train_split=train", "eval.test=false", "trainer.epochs=3", "eval.every_epochs=3"),
        "questions",
        "val",
    ),
    Trial("SNLI-VE: accuracy", "snli_ve_base", "snli_ve", "snli_ve/test/accuracy", ("trainer.epochs=8",), "hypotheses"),
    Trial(
        "NLVR2: accuracy",
        "nlvr2_base",
        "nlvr2",
        "nlvr2/test/accuracy",
        ("trainer.epochs=6", "optimizer.lr=3e-4"),  # at 1e-3 it stays at chance
        "statements",
        "test1",
    ),
    Trial(
        "16-way retrieval: mean recall",
        "retrieval_flickr_itm",
        "flickr30k_karpathy",
        "retrieval/test/r_mean",
        ("global_batch=32", "trainer.max_steps=200", "eval.every_epochs=null", FEW),
        chance=0.053,
    ),
    Trial(
        "retrieval by ITC and ITM: mean recall",
        "retrieval_flickr_itm_itc",
        "flickr30k_karpathy",
        "retrieval/test/r_mean",
        ("trainer.epochs=2", "eval.every_epochs=2", "task.evaluators.retrieval.k_test=16", FEW),
        chance=0.053,
    ),
    Trial("CIFAR-10: accuracy", "cifar10", "cifar10", "cifar/val/accuracy", ("trainer.epochs=10",), ""),
    *(
        Trial(
            f"GLUE {task}: its own score",
            f"glue_{task}",
            f"glue_{task}",
            "glue/val/score",
            ("trainer.epochs=6", "optimizer.lr=3e-4", "eval.test=false")  # at 1e-3 it predicts the mean
            if task == "stsb"
            else ("trainer.epochs=3", "eval.test=false"),
            "sentences",
            "dev_matched" if task == "mnli" else "dev",
        )
        for task in GLUE
    ),
)


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def make_shards(out: Path, pictures: int) -> None:
    """Raw trees and shards of every source that a trial names."""
    for source in dict.fromkeys(trial.source for trial in (PRETRAINING, *TRIALS)):
        shards = out / "shards" / source
        if (shards / "index.json").is_file():
            continue
        name = "glue" if source.startswith("glue_") else source
        raw = out / "raw" / name
        if not raw.is_dir():
            run("bt.samples", "icons", "--out", str(out), "--source", name, "--limit", str(pictures))
        convert(source_of(source, raw), shards)


def train(trial: Trial, out: Path, seed: int, settings: list[str]) -> dict[str, Any]:
    """report.json of the trial's run, which is trained unless it is there."""
    run_dir = out / "runs" / f"{trial.experiment}-seed{seed}"
    data = out / "shards" / trial.source
    overrides = [part.format(data=data) for part in trial.overrides]
    if trial is not PRETRAINING:
        overrides += [f"data.dir={data}", f"init_from={out / 'runs' / f'{PRETRAINING.experiment}-seed{seed}'}"]
        overrides += ["checkpoint.ignore_heads=true"]
    sizes = ["encoder.vision.image_size=96", "data.max_text_len=40"]
    run(
        "bt.train",
        f"experiment={trial.experiment}",
        "trainer=small",
        *sizes,
        *overrides,
        f"seed={seed}",
        f"run_dir={run_dir}",
        *settings,
    )
    return json.loads((run_dir / "report.json").read_text())


@dataclass(frozen=True)
class Labelled:
    """An entry: number of its sample, text, thumbnail of the sample's pictures, and the score of every answer."""

    sample: int
    text: str
    picture: np.ndarray
    scores: dict[Any, float]


def labelled(shards: ShardSet, field: str) -> Iterator[Labelled]:
    for number in range(len(shards)):
        sample = shards.read(number)
        pixels = [np.asarray(decode(data).convert("RGB").resize((SIDE, SIDE))) for data in sample.images.values()]
        picture = np.concatenate([p.ravel() for p in pixels]).astype(np.float32) if pixels else np.zeros(1, np.float32)
        for entry in sample.info[field] if field else [sample.info]:
            text = " | ".join(str(entry[key]) for key in ("question", "text", "text_pair") if key in entry)
            yield Labelled(number, text, picture, entry.get("answers") or {entry["label"]: 1.0})


def baselines(trial: Trial, data: Path) -> tuple[dict[str, float], float | None]:
    """Scores of answers by majority, by the text alone (the best one for this very text in training) and by the image
    alone (the best one for the nearest training picture, whatever was asked). The second value looks at both: the
    answer for the nearest training picture about which the same was asked; None for tasks of one modality."""
    if trial.chance is not None:
        return {"chance": trial.chance}, None
    if "stsb" in trial.experiment:  # a correlation: predictions that are all the same have none
        return {"majority": 0.0}, None
    known = list(labelled(ShardSet(data, "train"), trial.texts))
    asked = list(labelled(ShardSet(data, trial.split), trial.texts))
    overall = best(known)
    by_text, by_sample = grouped(known, "text"), grouped(known, "sample")
    found = {"majority": [overall] * len(asked)}
    pictured, both = len(known[0].picture) > 1, None
    if trial.texts and pictured:
        answers = {text: best(entries) for text, entries in by_text.items()}
        found["text only"] = [answers.get(entry.text, overall) for entry in asked]
        # The other way round with the text as the key: the nearest of the pictures that come with it.
        same = {text: Nearest([[entry] for entry in entries]) for text, entries in by_text.items()}
        both = score(asked, [same[entry.text](entry) if entry.text in same else overall for entry in asked])
    if pictured:
        nearest = Nearest(list(by_sample.values()))
        found["image only"] = [nearest(entry) for entry in asked]
    return {name: score(asked, answers) for name, answers in found.items()}, both


def score(asked: list[Labelled], answers: list[Any]) -> float:
    return statistics.fmean(entry.scores.get(answer, 0.0) for entry, answer in zip(asked, answers, strict=True))


def grouped(entries: list[Labelled], field: str) -> dict[Any, list[Labelled]]:
    groups: dict[Any, list[Labelled]] = defaultdict(list)
    for entry in entries:
        groups[getattr(entry, field)].append(entry)
    return groups


class Nearest:
    """The best answer of that group of entries (one picture each) whose picture is the nearest one."""

    def __init__(self, groups: list[list[Labelled]]):
        self.pictures = np.stack([group[0].picture for group in groups])
        self.answers = [best(group) for group in groups]

    def __call__(self, entry: Labelled) -> Any:
        return self.answers[int(np.square(self.pictures - entry.picture).sum(axis=1).argmin())]


def best(entries: list[Labelled]) -> Any:
    """The answer with the largest sum of scores."""
    total: Counter = Counter()
    for entry in entries:
        total.update(entry.scores)
    return total.most_common(1)[0][0]


def rows_of(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for name, result in results.items():
        values = [100 * value for value in result["values"]]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        against = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in result["baselines"].items())
        margin = statistics.fmean(values) - 100 * max(result["baselines"].values())
        both = "" if result["lookup"] is None else f"{100 * result['lookup']:.1f}"
        minutes = statistics.fmean(result["seconds"]) / 60
        rows.append(
            [
                name,
                f"{statistics.fmean(values):.1f}{spread}",
                against,
                f"{margin:+.1f}",
                both,
                f"{minutes:.1f}",
                str(len(values)),
            ]
        )
    return rows


HEADER = ["task", "this model", "baselines", "margin", "lookup by both", "minutes", "seeds"]


def write(out: Path, results: dict[str, dict[str, Any]]) -> None:
    rows = rows_of(results)
    lines = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *rows]]
    (out / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(9, 0.5 * len(results) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, names = figure.subplots(), list(results)
    for place, result in enumerate(results.values()):
        axes.barh(place, 100 * statistics.fmean(result["values"]), color="#3b6ea5", height=0.6)
        for value in result["baselines"].values():
            axes.plot([100 * value] * 2, [place - 0.4, place + 0.4], color="crimson", linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("score of this model (bars) and of baselines (red lines), %")
    figure.savefig(out / "report.png", dpi=110)
    print("\n".join(lines), flush=True)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench.tasks_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--pictures", type=int, default=4800, help="icons in all; a sixth of them each for val and test"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="EXPERIMENT", help="these, of all")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run, such as trainer.threads=1")
    arguments = parser.parse_args(given)
    out, results = arguments.out, {}
    make_shards(out, arguments.pictures)
    for trial in (PRETRAINING, *TRIALS):
        if arguments.only and trial.experiment not in arguments.only:
            continue
        reports = [train(trial, out, seed, arguments.settings) for seed in arguments.seeds]
        alone, lookup = baselines(trial, out / "shards" / trial.source)
        results[trial.name] = {
            "experiment": trial.experiment,
            "values": [report["metrics"][trial.metric] for report in reports],
            "seconds": [report["seconds"] for report in reports],
            "baselines": alone,
            "lookup": lookup,
        }
        write(out, results)
    total = sum(sum(result["seconds"]) for result in results.values())
    print(f"\nwritten: {out}/report.json, report.md, report.png; {duration(total)} of training")


if __name__ == "__main__":
    main()
