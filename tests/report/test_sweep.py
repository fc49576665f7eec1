"""Sweeps of the official grids, and the table of their best members."""

import itertools
import json

import pytest

from bt.errors import DataError
from bt.report.__main__ import main
from bt.report.sweep import Best, Member, best_of, read_members
from tests.test_config import Command
from tests.test_train import run

CIFAR = [("cifar10", "cifar100"), (1e-5, 2e-5), (512,), (10, 100)]
GLUE = [
    [f"glue_{task}" for task in ("cola", "mrpc", "sst2", "qqp", "stsb", "rte", "qnli", "mnli")],
    (1e-5, 2e-5),
    (16, 32),
    (10,),
]
# The loops of ftfpt_{cifar,glue}{,_meter}.sh: recipe, learning rate, batch, epochs.
GRIDS = {
    "cifar": CIFAR,
    "glue": GLUE,
    "meter_cifar": [[f"meter_{name}" for name in CIFAR[0]], *CIFAR[1:]],
    "meter_glue": [[f"meter_{name}" for name in GLUE[0]], *GLUE[1:]],
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_sweep_is_the_official_grid(monkeypatch, capfd, tmp_path, name):
    command = Command(monkeypatch, capfd, tmp_path)
    starts = (None, "runs/pre") if name == "cifar" else ("runs/pre",)
    assert command(f"sweep={name}", "init_from=null,runs/pre" if name == "cifar" else "init_from=runs/pre") == (0, "")
    found = [
        (cfg.name, cfg.optimizer.lr, cfg.global_batch, cfg.trainer.epochs, cfg.init_from) for cfg, _ in command.called
    ]
    assert sorted(found, key=str) == sorted(itertools.product(*GRIDS[name], starts), key=str)
    folders = {run_dir for _, run_dir in command.called}
    assert len(folders) == len(found) and {str(folder.parent) for folder in folders} == {f"sweeps/{name}"}


def test_the_table_of_a_finished_sweep(tmp_path, monkeypatch, capsys):
    settings = ["sweep=cifar", "trainer=smoke", "tracking=none", "trainer.max_steps=2", "experiment=cifar10,cifar100"]
    done = run("bt.train", *settings, "trainer.epochs=10", "optimizer.lr=1e-5,1e-1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    main(["--sweep", "cifar", "--best"])
    shown = capsys.readouterr().out.splitlines()
    reports = [json.loads(path.read_text()) for path in (tmp_path / "sweeps/cifar").glob("*/report.json")]
    assert len(reports) == 4 and len(shown) == 4
    for line, recipe in zip(shown[2:], ("cifar10", "cifar100"), strict=True):
        best = max(report["metrics"]["cifar/val/accuracy"] for report in reports if report["name"] == recipe)
        cells = line.split()
        assert cells[:4] == [recipe, "-", "cifar/val/accuracy", f"{best:.4f}"] and "2 of 2" in line
        assert cells[-1] in ("optimizer.lr=1e-05", "optimizer.lr=0.1")


def member(value: float | None, *, mode: str = "max", start: str | None = None, **options) -> Member:
    config = {"name": "glue_cola", "init_from": start, "task.metric": "glue/val/score", "task.mode": mode}
    return Member({**config, **{key.replace("_", ".", 1): option for key, option in options.items()}}, value)


def test_seeds_are_averaged_and_what_is_searched_is_named():
    grid = [
        member(0.9, optimizer_lr=1e-5, seed=0),
        member(0.1, optimizer_lr=1e-5, seed=1),
        member(0.6, optimizer_lr=2e-5, seed=0),
        member(0.7, optimizer_lr=2e-5, seed=1),
        member(None, optimizer_lr=3e-5, seed=0),
        member(0.3, optimizer_lr=1e-5, seed=0, start="runs/pre"),
        member(None, start="runs/other"),
    ]
    plain, other, tuned = best_of(grid)
    assert plain == Best("glue_cola", None, "glue/val/score", pytest.approx(0.65), 2, {"optimizer.lr": 2e-5}, 4, 5)
    assert tuned == Best("glue_cola", "runs/pre", "glue/val/score", 0.3, 1, {}, 1, 1)
    assert other == Best("glue_cola", "runs/other", "glue/val/score", None, 0, {}, 0, 1)


def test_a_metric_that_is_to_be_small():
    (best,) = best_of([member(value, mode="min", optimizer_lr=value) for value in (0.5, 0.2, 0.4)])
    assert (best.value, best.settings) == (0.2, {"optimizer.lr": 0.2})


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: sweeps/nope is no directory of a sweep: it holds no run$"):
        main(["--sweep", "nope", "--best"])
    (tmp_path / "sweeps/broken/one").mkdir(parents=True)
    (tmp_path / "sweeps/broken/one/config.yaml").write_text("name: one\ntask: {metric: a/val/b, mode: max}\n")
    assert read_members(tmp_path / "sweeps/broken")[0].value is None
    (tmp_path / "sweeps/broken/one/report.json").write_text("[]")
    with pytest.raises(DataError, match="report.json is no report of a run"):
        read_members(tmp_path / "sweeps/broken")
