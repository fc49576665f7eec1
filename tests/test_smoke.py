"""Experiments end to end with trainer=smoke, on samples that are made on the spot."""

import json
import math

import pytest

from bt import smoke
from bt.config import compose_run
from bt.errors import ConfigError
from tests.test_train import run

# One of each task, of both sizes and families; the others are `make smoke`'s.
EIGHT = {
    "pretrain_large": "itm/val/accuracy",
    "vqa_base_vgqa": "vqa/val/score",
    "snli_ve_base": "snli_ve/val/accuracy",
    "meter_nlvr2": "nlvr2/val/accuracy",
    "retrieval_flickr_itm": "irtr/val/loss",
    "retrieval_coco_itm_itc": "retrieval/val/r_mean",
    "cifar100": "cifar/val/accuracy",
    "glue_mnli": "glue/val/score",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", EIGHT)
def test_an_experiment_of_each_task(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    (outcome,) = smoke.smoke([name], ["tracking=none"])
    assert outcome.error is None, outcome.output
    assert outcome.metric == EIGHT[name] and math.isfinite(outcome.value) and outcome.seconds < 60
    report = json.loads((folder / "runs" / name / "report.json").read_text())
    assert report["steps"] == 3 and report["metrics"][EIGHT[name]] == outcome.value


def test_the_table_and_its_status(monkeypatch, tmp_path, capsys):
    """What fails is said and does not end the others; a bug of ours is shown with its traceback."""
    monkeypatch.chdir(tmp_path)

    def broken(experiments, overrides):
        yield from (smoke.Outcome("good", 2.0, "vqa/val/score", 0.25), smoke.attempt("bad", lambda: {}["nope"]))

    monkeypatch.setattr(smoke, "smoke", broken)
    with pytest.raises(SystemExit) as end:
        smoke.main([])
    said = capsys.readouterr()
    assert end.value.code == 1 and "good" in said.out and "vqa/val/score 0.2500" in said.out
    assert "FAILED: 'nope'" in said.out and "1 of 2 experiments ran to their end" in said.out
    assert "--- bad ---" in said.err and "KeyError" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["nope", "cifar10"]
    unknown, wrong = smoke.smoke(names, ["optimizer.lr=-1"])
    assert unknown.error.startswith(
        "experiment=nope does not exist; experiment is one of: ablation, ablation_encoders, cifar10, "
    )
    assert wrong.error == "optimizer.lr=-1.0 is out of range: must be more than 0"
    with pytest.raises(ConfigError, match="data.dir=null must be a directory"):
        compose_run("data=shards", "trainer=smoke")
    (none,) = smoke.smoke(["cifar10"], ["data.dir=samples:imagenet"])
    assert none.error.startswith("no offline samples of imagenet: there are coco_karpathy, ")


def test_from_an_empty_folder_by_the_command(tmp_path):
    """`bt.train` makes the samples that it names, `bt.evaluate` finds them again."""
    settings = ["experiment=cifar10", "trainer=smoke", "tracking=none", "run_dir=run"]
    done = run("bt.train", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "data/samples").iterdir()] == ["cifar10"]
    accuracy = json.loads((tmp_path / "run/report.json").read_text())["metrics"]["cifar/val/accuracy"]
    done = run("bt.evaluate", "run_dir=run", "split=val", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run/evaluation-val.json").read_text())["metrics"]
    assert found["cifar/val/accuracy"] == accuracy
