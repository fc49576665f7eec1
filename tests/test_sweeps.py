"""The grids of conf/sweep/, and what a sweeper gets back from the entry point."""

import json
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

from bt.config.entry import CONF_DIR
from bt.config.record import what_matters
from tests.test_config import Command

OFFICIAL = {"cifar", "glue", "meter_cifar", "meter_glue"}  # tests/report/test_sweep.py
# How many members for one seed, and the options that tell them apart.
GRIDS = {
    "bridges": (15, {"bridge._target_"}),
    "cross_layers": (12, {"cross.layers", "bridge._target_"}),
    "bridged_layers": (6, {"bridge.uni_layers", "bridge.stop_gradient"}),
    "encoders": (18, {"encoder.vision.name", "encoder.text.name"}),
    "lr_multiplier": (4, {"optimizer.cross_multiplier"}),
    "meter_vs_bridgetower_vs_managertower": (4, {"bridge._target_"}),
    "objectives": (4, {"task.objectives.mlm.weight", "task.objectives.itc.weight"}),
    "cifar_glue": (10, {"name"}),
    "seeds": (1, set()),
    "ablation_bridges": (12, {"bridge._target_"}),
    "ablation_layers": (12, {"cross.layers", "bridge._target_"}),
}
EXPERIMENT = {"objectives": "pretrain_base"}
OWN_EXPERIMENT = {"cifar_glue", "ablation_bridges", "ablation_layers"}  # the sweep names it


def test_every_sweep_is_tested():
    assert {path.stem for path in Path(CONF_DIR, "sweep").glob("*.yaml")} == OFFICIAL | set(GRIDS)


@pytest.mark.parametrize("name", GRIDS)
def test_a_sweep_composes(monkeypatch, capfd, tmp_path, name):
    """Every member passes all checks of the configuration, and no two are the same run."""
    command, (members, keys) = Command(monkeypatch, capfd, tmp_path), GRIDS[name]
    experiment = [] if name in OWN_EXPERIMENT else [f"experiment={EXPERIMENT.get(name, 'vqa_base')}"]
    assert command(f"sweep={name}", "seed=7", *experiment) == (0, "")
    configs = [what_matters(cfg) for cfg, _ in command.called]
    assert len({str(run_dir) for _, run_dir in command.called}) == len(configs) == members
    differ = {key for config in configs for key in config if config[key] != configs[0].get(key)}
    assert keys <= differ
    assert {config["seed"] for config in configs} == {7}  # the command line beats the sweep


def test_three_seeds_unless_told_otherwise(monkeypatch, capfd, tmp_path):
    command = Command(monkeypatch, capfd, tmp_path)
    assert command("sweep=lr_multiplier", "experiment=vqa_base") == (0, "")
    found = [(cfg.optimizer.cross_multiplier, cfg.seed) for cfg, _ in command.called]
    assert sorted(found) == [(rate, seed) for rate in (1, 2, 5, 10) for seed in (0, 1, 2)]


def test_a_sweeper_gets_the_metric_of_each_member(command, monkeypatch, tmp_path):
    """What Optuna's and other sweepers optimise: the value that the program returns, by Hydra's basic sweeper."""
    returned, make = [], Plugins.instantiate_launcher

    def watched(self, **named):
        launcher = make(self, **named)
        launch = launcher.launch

        def listen(*arguments, **options):
            jobs = launch(*arguments, **options)
            returned.extend((job.overrides, job.return_value) for job in jobs)
            return jobs

        launcher.launch = listen
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", watched)
    settings = ["experiment=snli_ve_base", "trainer=smoke", "tracking=none", "hydra.sweep.dir=here"]
    assert command("-m", *settings, "optimizer.lr=1e-3,1e-2") == (0, "")
    reports = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "here").glob("*/report.json")}
    configs = {name: (tmp_path / "here" / name / "config.yaml").read_text() for name in reports}
    assert len(returned) == len(reports) == 2
    for overrides, value in returned:
        rate = next(word.split("=")[1] for word in overrides if word.startswith("optimizer.lr="))
        (name,) = [name for name, text in configs.items() if f"  lr: {float(rate)}\n" in text]
        assert value == reports[name]["metrics"]["snli_ve/val/accuracy"]
    # Finished members give their value again without being trained again.
    first = list(returned)
    returned.clear()
    assert command("-m", *settings, "optimizer.lr=1e-3,1e-2") == (0, "") and returned == first
