"""`make ablation`: what it says beforehand, and the commands that it runs."""

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from bt import ablation
from bt.config import compose_run
from bt.config.entry import CONF_DIR
from bt.engine.members import labels_of_grid


def test_it_says_how_long_it_takes_and_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(ablation.os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr(ablation, "run_module", lambda *words: called.append(words))
    monkeypatch.setattr(sys, "argv", ["bt.ablation", "tracking.uri=sqlite:///other.db"])
    ablation.main()
    runs = sum(members for _, members, _ in ablation.SWEEPS)
    whole = ablation.duration((runs * ablation.SECONDS["run"] + ablation.SECONDS["encoders"]) / 3)
    assert f"{runs} of {runs} runs are missing: about {whole} with 3 at a time" in capsys.readouterr().out
    assert [words[0] for words in called] == [
        "bt.convert",
        "bt.train",
        "bt.train",
        "bt.report",
        "bt.train",
        "bt.report",
    ]
    sweeps = [words for words in called if "-m" in words]
    assert all("hydra.launcher.max_parallel=3" in words for words in sweeps)
    assert all("tracking.uri=sqlite:///other.db" in words and "hydra/launcher=local" in words for words in sweeps)
    # Finished runs are not counted again, and tell how long the others take.
    for name, seconds in (("one", 10.0), ("two", 30.0)):
        folder = Path("sweeps/ablation_bridges", name)
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"seconds": seconds}))
    Path("runs/ablation_encoders").mkdir(parents=True)
    Path("runs/ablation_encoders/report.json").write_text("{}")
    assert ablation.forecast() == (runs - 2, (runs - 2) * 20.0)


def test_the_numbers_of_members_are_those_of_the_sweeps():
    for name, members, against in ablation.SWEEPS:
        sweep = OmegaConf.load(Path(CONF_DIR, "sweep", f"{name}.yaml"))
        sweep.hydra.overrides = {"task": []}
        labels = labels_of_grid(sweep)
        assert len(labels) == members
        assert against is None or any(against in label.split() for label in labels)


def test_all_runs_have_the_same_budget_and_start():
    """Only what is compared differs: the encoders that all start from fit them."""
    encoders, run = compose_run("experiment=ablation_encoders"), compose_run("experiment=ablation")
    assert encoders.encoder == run.encoder and run.checkpoint.encoders_only
    assert encoders.data.dir == run.data.dir and encoders.data.train_split == run.data.train_split
    assert run.trainer.epochs is None and run.trainer.max_steps and encoders.cross["layers"] == 0
