"""`bt.train` and `bt.evaluate` as a user runs them: a whole run, going on after SIGKILL, and what stops it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FAST = ["trainer=smoke", "data.workers=0", "tracking=none"]


def start(module: str, *arguments: object, cwd: Path = ROOT, **options) -> subprocess.Popen:
    """python -m module, or python -c with the code as the first of the arguments."""
    return subprocess.Popen(
        [sys.executable, *(["-c"] if module == "-c" else ["-m", module]), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(module: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    process = start(module, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def journal(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A pre-training and the fine-tune from it, in a directory of their own with its MLflow store."""
    root = tmp_path_factory.mktemp("runs")
    settings = ["trainer=smoke", f"data.dir={data_dir}"]
    first = run("bt.train", "experiment=easy_vqa_pretrain", "run_dir=pretrain", *settings, cwd=root)
    assert first.returncode == 0, first.stderr
    second = run("bt.train", "experiment=easy_vqa", "run_dir=vqa", "init_from=pretrain", *settings, cwd=root)
    assert second.returncode == 0, second.stderr
    return root, settings, first, second


def test_a_run_leaves_what_it_says(finished):
    root, _, first, second = finished
    report = json.loads((root / "vqa/report.json").read_text())
    lines = journal(root / "vqa")
    steps = [line for line in lines if "vqa/train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"epoch", "lr/base", "lr/head", "lr/cross", "pairs_per_second"} <= steps[0].keys()
    assert {"mlm/train/loss", "itm/train/loss", "itc/train/loss"} <= journal(root / "pretrain")[0].keys()
    validation = next(line for line in lines if "vqa/val/score" in line)
    assert report["metrics"]["vqa/val/score"] == validation["vqa/val/score"]
    assert {"vqa/test/score", "vqa/test/score_yes_no", "vqa/test/loss"} <= report["metrics"].keys()
    state = json.loads((root / "vqa/checkpoints/last/state.json").read_text())
    assert state["step"] == report["steps"] == 3
    weights = load_file(root / "vqa/checkpoints/best/model.safetensors")
    assert report["parameters"]["all"] == sum(value.numel() for value in weights.values())
    assert report["peak_memory_bytes"] > 2**28 and report["git_revision"]
    assert (root / "vqa/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "vqa/test/score" in second.stdout
    assert "itc: 7 negatives per pair, of micro-batches of 8 on 1 ranks (" in first.stdout
    assert "new heads: vqa; heads in the checkpoint that are not used: itc, itm, mlm" in second.stdout


def test_the_run_is_in_mlflow(finished):
    root, *_ = finished
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("bt").experiment_id])}
    assert set(runs) == {"easy_vqa", "easy_vqa_pretrain"}
    tracked, report = runs["easy_vqa"], json.loads((root / "vqa/report.json").read_text())
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["vqa/test/score"] == report["metrics"]["vqa/test/score"]
    losses = [(point.step, point.value) for point in client.get_metric_history(tracked.info.run_id, "vqa/train/loss")]
    assert losses == [(line["step"], line["vqa/train/loss"]) for line in journal(root / "vqa") if "lr/base" in line]
    assert tracked.data.params["optimizer.lr"] and tracked.data.tags["git_revision"] == report["git_revision"]
    assert tracked.data.tags["git_dirty"] in ("True", "False")
    names = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id)}
    assert {"config.yaml", "curves.png", "report.json"} <= names


def test_the_same_command_again_says_that_it_is_finished(finished):
    root, settings, *_ = finished
    before = (root / "vqa/report.json").stat().st_mtime_ns
    again = run("bt.train", "experiment=easy_vqa", "run_dir=vqa", "init_from=pretrain", *settings, cwd=root)
    assert again.returncode == 0 and "already finished" in again.stdout
    assert (root / "vqa/report.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused_with_the_keys_that_differ(finished):
    root, settings, *_ = finished
    other = run(
        "bt.train", "experiment=easy_vqa", "run_dir=vqa", "init_from=pretrain", *settings, "optimizer.lr=0.5", cwd=root
    )
    assert other.returncode == 1 and len(other.stderr.splitlines()) == 1
    assert "optimizer.lr" in other.stderr and "0.5" in other.stderr and "seed" not in other.stderr


def test_evaluation_repeats_the_reported_metrics(finished):
    root, *_ = finished
    report = json.loads((root / "vqa/report.json").read_text())["metrics"]
    done = run("bt.evaluate", "run_dir=vqa", "split=test", cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "vqa/evaluation-test.json").read_text())["metrics"]
    assert found == {key: value for key, value in report.items() if "/test/" in key}
    rows = [json.loads(line) for line in (root / "vqa/predictions-test.jsonl").read_text().splitlines()]
    assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(found["vqa/test/score"])


def test_going_on_after_sigkill_is_exact(tmp_path, few_dir):
    """Killed at a random step, mid-epoch, with two loader workers: the same lines and bits."""
    settings = [
        "experiment=easy_vqa_pretrain", f"data.dir={few_dir}", "encoder=tiny", "cross=tiny", "tracking=none",
        "global_batch=16", "trainer.epochs=null", "trainer.max_steps=40", "trainer.log_every=1", "data.workers=2",
        "checkpoint.every_steps=5", "eval.every_epochs=null", "eval.every_steps=16", "eval.test=false",
    ]  # fmt: skip
    whole = run("bt.train", *settings, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    process = start("bt.train", *settings, f"run_dir={tmp_path}/killed", start_new_session=True)
    last, path = random.randrange(6, 34), tmp_path / "killed/metrics.jsonl"
    while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < last):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/report.json").exists()
    resumed = run("bt.train", *settings, f"run_dir={tmp_path}/killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing at step" in resumed.stdout

    def lines(name: str) -> list[dict]:
        timing = ("time", "pairs_per_second", "data_wait_share")
        return [{k: v for k, v in line.items() if k not in timing} for line in journal(tmp_path / name)]

    assert lines("killed") == lines("whole") and len(lines("whole")) == 40 + 3
    for part in ("model", "optimizer"):
        one, other = (load_file(tmp_path / f"{n}/checkpoints/last/{part}.safetensors") for n in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


KILLED_BEFORE_ITS_REPORT = """
import os, signal
import bt.training
bt.training.Training.final_metrics = lambda self: os.kill(os.getpid(), signal.SIGKILL)
from bt.train import main
main()
"""


def test_patience_ends_a_run_that_gets_no_better(tmp_path, few_dir):
    """A rate of next to nothing: no evaluation is better than the first. The same run killed between its early end and
    its report does not train any further."""
    settings = [
        "experiment=easy_vqa", f"data.dir={few_dir}", *FAST, "optimizer.lr=1e-30", "trainer.max_steps=20",
        "eval.every_epochs=null", "eval.every_steps=2", "eval.patience=3",
    ]  # fmt: skip
    whole = run("bt.train", *settings, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    assert "no better evaluation in 3 in a row (eval.patience): training ends at step 8" in whole.stdout
    killed = run("-c", KILLED_BEFORE_ITS_REPORT, *settings, f"run_dir={tmp_path}/killed")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed/report.json").exists()
    before = (tmp_path / "killed/metrics.jsonl").read_text()
    resumed = run("bt.train", *settings, f"run_dir={tmp_path}/killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing at step 8 of 20" in resumed.stdout
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed"))
    assert (one["steps"], one["best_step"]) == (other["steps"], other["best_step"]) == (8, 2)
    assert one["metrics"] == other["metrics"] and "vqa/test/score" in one["metrics"]
    added = (tmp_path / "killed/metrics.jsonl").read_text().removeprefix(before).splitlines()
    assert len(added) == 1 and "vqa/test/score" in json.loads(added[0]), "the test's line and no further step"


def test_patience_counts_from_the_last_best(tmp_path, few_dir):
    """With a rate that learns, the run goes on while it gets better, and ends after the given evaluations without."""
    settings = [
        "experiment=easy_vqa", f"data.dir={few_dir}", *FAST, "optimizer.lr=1e-2", "trainer.max_steps=400",
        "data.max_samples=null", "eval.every_epochs=null", "eval.every_steps=10", "eval.patience=2", "eval.test=false",
    ]  # fmt: skip
    done = run("bt.train", *settings, f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    scores = [line["vqa/val/score"] for line in journal(tmp_path / "run") if "vqa/val/score" in line]
    best = max(range(len(scores)), key=scores.__getitem__)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert len(scores) == best + 1 + 2 and report["best_step"] == 10 * (best + 1)
    # It had been that long without a new best never before.
    records = [i for i, score in enumerate(scores) if score > max(scores[:i], default=-1)]
    assert all(b - a <= 2 for a, b in zip(records, records[1:], strict=False))
    assert report["steps"] == 10 * len(scores) < 400 and report["metrics"]["vqa/val/score"] == scores[best]


def test_sigterm_to_the_process_group_saves_the_running_step(tmp_path, few_dir):
    """As torchrun and SLURM send it: to the loader workers too."""
    settings = ["experiment=easy_vqa", f"data.dir={few_dir}", *FAST, "trainer.max_steps=5000", "data.workers=2"]
    process = start("bt.train", *settings, f"run_dir={tmp_path}/run", start_new_session=True)
    path = tmp_path / "run/metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on from there" in err, err
    saved = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["step"]
    assert saved == journal(tmp_path / "run")[-1]["step"]


def test_two_ranks_run_as_one(tmp_path, few_dir):
    """torchrun -m bt.train: losses, validation, the test's metrics and predictions in the split's order."""
    settings = [
        "experiment=easy_vqa", f"data.dir={few_dir}", *FAST, "encoder.text.dropout=0", "cross.dropout=0",
        "eval.max_samples=9", "eval.batch=7", "optimizer.lr=1e-2",
    ]  # fmt: skip
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "bt.train"]
    for module, arguments, name in (("bt.train", [], "one"), ("torch.distributed.run", torchrun, "two")):
        done = run(module, *arguments, *settings, f"run_dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}/report.json").read_text()) for name in ("one", "two"))
    assert two["world_size"] == 2 and two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    losses = [[line["vqa/train/loss"] for line in journal(tmp_path / n) if "lr/base" in line] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 3
    ids = [
        [json.loads(line)["question_id"] for line in (tmp_path / n / "predictions-test.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert ids[0] == ids[1] and len(ids[0]) > 20
