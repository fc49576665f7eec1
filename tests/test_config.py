"""The configuration as a user meets it: at the command line, in files and in a run's directory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bt.config import Config, OptimizerConfig, config_hash, diff_configs, entry, prepare_run_dir, read_config
from bt.config.entry import CONF_DIR
from bt.config.record import record, resolve_run_dir, to_config
from bt.errors import ConfigError, UserError

REPOSITORY = Path(CONF_DIR).parent
TINY = ["encoder=tiny", "cross=tiny"]


def composed(*overrides: str, conf: str = CONF_DIR) -> Config:
    with initialize_config_dir(conf, version_base="1.3"):
        return to_config(compose("config", list(overrides)))


class Command:
    """An entry point run in this process: the configurations that it was called with, and what it printed."""

    def __init__(self, monkeypatch, capfd, directory: Path):
        self.monkeypatch, self.capfd, self.called = monkeypatch, capfd, []
        monkeypatch.chdir(directory)
        monkeypatch.setattr(sys, "path", list(sys.path))

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status and standard error."""
        self.monkeypatch.setattr(sys, "argv", ["train", *arguments])
        self.called.clear()

        @entry("config", Config)
        def main(cfg: Config) -> None:
            self.called.append((cfg, resolve_run_dir(cfg)))

        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, self.capfd.readouterr().err


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    return Command(monkeypatch, capfd, tmp_path)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizer.lrr=1", "unknown option optimizer.lrr (did you mean optimizer.lr?); optimizer: betas, "),
        ("nosuch.a=1", "unknown option nosuch; top-level options: bridge, checkpoint, "),
        ("+optimizer.foo=1", "unknown option optimizer.foo; optimizer: betas"),
        ("cross.foo=1", "unknown option cross.foo; cross: dropout, ffn_ratio, heads"),
        ("+cross.foo=1", "unknown option cross.foo: bt.models.cross_modal.CoAttention takes width, heads"),
        ("task=nope", "task=nope does not exist; task is one of: "),
        ("experiment=nope", "experiment=nope does not exist; experiment is one of:"),
        ("optimizer.lr=abc", "optimizer.lr=abc has the wrong type: must be a number"),
        ("trainer.epochs=1.5", "trainer.epochs=1.5 has the wrong type: must be a whole number"),
        ("eval.test=maybe", "eval.test=maybe has the wrong type: must be true or false"),
        ("optimizer.warmup=abc", "optimizer.warmup=abc has the wrong type: must be a number"),
        ("cross.heads=two", "cross.heads='two' has the wrong type: bt.models.cross_modal.CoAttention takes int"),
        ("data.fraction=0", "data.fraction=0.0 is out of range: must be more than 0 and at most 1"),
        ("optimizer.lr=nan", "optimizer.lr=nan must be a finite number"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas=1.0 is out of range: must be at least 0 and less than 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas must have 2 values"),
        ("trainer.precision=fp8", "trainer.precision=fp8 is not one of: fp32, bf16, fp16"),
        ("optimizer.warmup=1.5", "optimizer.warmup=1.5 is out of range: a fraction is at most 1"),
        ("trainer.epochs=null", "trainer.epochs and trainer.max_steps are both null"),
        ("data.dir=???", "data.dir must be given"),
        ("data.dir=3", "data.dir=3 must be a directory or a list of directories"),
        ("name=a/b", "name='a/b' names directories"),
        ("seed=${nope}", "seed: Interpolation key 'nope' not found"),
        ("run_dir=a(b", "argument 'run_dir=a(b' is not understood"),
        ("lr", "argument 'lr' is not understood: options are written key=value"),
        ("optimizer.lr=1,2", "several values need -m"),
        ("sweep=a,b", "sweep=a,b: one sweep at a time"),
        ("optimizer=3", "Config group override must be a string"),
        ("bridge._target_=nope.Bridge", "bridge._target_=nope.Bridge: no module named 'nope'"),
        ("bridge._target_=bt.models.bridges.add.Nope", "bt.models.bridges.add has no Nope"),
        ("~bridge._target_", "bridge has no _target_: choose an option of the group"),
        ("plugins=[/nonexistent]", "plugins: /nonexistent is not a directory"),
        ("task.objectives.vqa.layers=two", "task.objectives.vqa.layers='two' has the wrong type"),
        ("+encoder.text.tokenizer.colour=1", "unknown option encoder.text.tokenizer.colour: "),
        ("encoder.text.tokenizer.vocab_size=many", "encoder.text.tokenizer.vocab_size='many' has the wrong type"),
        ("~encoder.text.tokenizer", "encoder.text.tokenizer must be given"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(command, argument, said):
    status, error = command(*TINY, argument)
    assert (status, error.count("\n"), command.called) == (1, 1, []), error
    assert error.startswith("error: ") and said in error


def test_debug_shows_the_traceback(command):
    status, error = command("debug=true", "seed=-1")
    assert status == 1 and "Traceback" in error and error.splitlines()[-1].startswith("error: seed=-1 is out of range")


@pytest.mark.parametrize("written", ["debug=1", "debug=yes", "+experiment=loud"])
def test_debug_counts_however_it_is_written(command, tmp_path, written):
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "loud.yaml").write_text("# @package _global_\ndebug: true\n")
    where = ["--config-dir", str(tmp_path / "more"), written.removeprefix("+")]
    status, error = command(*where, "seed=-1")
    assert status == 1 and "Traceback" in error and error.splitlines()[-1].startswith("error: seed=-1 is out of range")
    assert "Traceback" not in command(*TINY, "seed=-1")[1], "one program's debug is not the next one's"


def test_an_error_of_the_program_is_not_taken_for_the_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *TINY])

    @entry("config", Config)
    def main(cfg: Config) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        main()


def test_files_and_command_line_beat_each_other_in_order(command, tmp_path):
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\nglobal_batch: 40\ntrainer: {max_steps: 99, epochs: 7}\n"
    )
    where = ["--config-dir", str(tmp_path / "more"), "experiment=mine"]
    assert command(*TINY, *where) == (0, "")
    assert (command.called[0][0].trainer.max_steps, command.called[0][0].trainer.epochs) == (99, 7)
    assert command(*where, "trainer=smoke", "tracking=none", "global_batch=4") == (0, "")
    cfg = command.called[0][0]
    assert (cfg.name, cfg.trainer.max_steps, cfg.trainer.epochs, cfg.global_batch) == ("mine", 3, 7, 4)
    assert cfg.tracking.kind == "none" and cfg.cross["width"] == 32
    (tmp_path / "more" / "experiment" / "bad.yaml").write_text("# @package _global_\noptimizer: {lrr: 1}\n")
    _, error = command(*where[:2], "experiment=bad")
    assert error.startswith("error: conf/experiment/bad: unknown option optimizer.lrr (did you mean optimizer.lr?)")


def test_a_plug_in_needs_a_file_and_a_module_alone(command, tmp_path):
    (tmp_path / "more" / "bridge").mkdir(parents=True)
    (tmp_path / "more" / "bridge" / "mine.yaml").write_text("_target_: my_bridges.Mine\ngain: 0.5\n")
    (tmp_path / "code").mkdir()
    code = "class Mine:\n    def __init__(self, width, layers, gain: float): ...\n"
    (tmp_path / "code" / "my_bridges.py").write_text(code)
    (tmp_path / "code" / "broken.py").write_text("import not_installed\n")
    where = [
        "encoder=tiny",
        "--config-dir",
        str(tmp_path / "more"),
        f"plugins=[{tmp_path / 'code'}]",
        "bridge=mine",
        "cross=tiny",
    ]
    assert command(*where) == (0, "")
    bridge = command.called[0][0].bridge
    assert (bridge["_target_"], bridge["gain"], bridge["sides"]) == ("my_bridges.Mine", 0.5, "both")
    _, error = command(*where, "+bridge.width=3")
    assert "unknown option bridge.width: my_bridges.Mine takes gain" in error
    _, error = command(*where, "bridge._target_=broken.Bridge")
    assert "importing broken fails: No module named 'not_installed'" in error and error.count("\n") == 1


def test_multirun_goes_on_after_a_member_that_fails(command, tmp_path):
    status, error = command(*TINY, "-m", "seed=0,-1,2", "name=grid")
    assert status == 1
    assert [cfg.seed for cfg, _ in command.called] == [0, 2]
    assert "error in member" in error and "seed=-1 is out of range" in error
    assert error.splitlines()[-1] == "error: 1 of the sweep's members failed"
    directories = [str(run_dir) for _, run_dir in command.called]
    assert len(set(directories)) == 2 and all(d.startswith("sweeps/grid/") for d in directories)
    # What does not compose is refused before any member runs.
    status, error = command(*TINY, "-m", "seed=0,1", "optimizer.lrr=1,2")
    assert (status, command.called) == (1, []) and "unknown option optimizer.lrr" in error


def test_a_signal_ends_the_whole_multirun(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *TINY, "-m", "seed=0,1,2"])
    called = []

    class Signal(UserError):
        ends_sweep = True

    @entry("config", Config)
    def main(cfg: Config) -> None:
        called.append(cfg.seed)
        if cfg.seed == 1:
            raise Signal("stopped by a signal after step 7")

    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, called) == (1, [0, 1])
    assert capfd.readouterr().err == "error: stopped by a signal after step 7\n"


def test_a_sweep_file_is_a_grid_by_its_name_alone(command, tmp_path):
    (tmp_path / "more" / "sweep").mkdir(parents=True)
    (tmp_path / "more" / "sweep" / "two.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {bridge: 'add,none'}}}\n"
    )
    assert command(*TINY, "--config-dir", str(tmp_path / "more"), "sweep=two", "seed=3") == (0, "")
    targets = [cfg.bridge["_target_"] for cfg, _ in command.called]
    assert targets == ["bt.models.bridges.add.AddBridge", "bt.models.bridges.none.NoBridge"]
    assert [cfg.seed for cfg, _ in command.called] == [3, 3]
    assert all(str(run_dir).startswith("sweeps/default/") for _, run_dir in command.called)


def test_hydra_leaves_nothing_behind(command, tmp_path):
    assert command(*TINY) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_help_and_cfg_answer_without_loading_a_framework(tmp_path):
    code = (
        "import atexit, runpy, sys\n"
        "slow = {'torch', 'transformers', 'mlflow'}\n"
        "atexit.register(lambda: print('frameworks:', sorted(slow & set(sys.modules))))\n"
        "runpy.run_module('bt.train', run_name='__main__')\n"
    )
    for arguments, expected in ((["--help"], "experiment: "), (["--cfg", "job", "seed=7"], "seed: 7\n")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout and "frameworks: []" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_files_show_every_option_with_its_default():
    cfg = composed()
    defaults = Config()
    for group in ("trainer", "checkpoint", "eval", "tracking", "optimizer", "data"):
        shown, default = dataclasses.asdict(getattr(cfg, group)), dataclasses.asdict(getattr(defaults, group))
        for key in ("dir", "samples"):  # of the data set, without defaults
            shown.pop(key, None), default.pop(key, None)
        assert shown == default
    for item in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(getattr(defaults, item.name)) and item.name not in ("bridge", "cross"):
            assert getattr(cfg, item.name) == getattr(defaults, item.name), item.name
    written = OmegaConf.load(Path(CONF_DIR) / "config.yaml")
    for group in ("trainer", "checkpoint", "eval"):
        assert set(written[group]) == set(dataclasses.asdict(getattr(defaults, group)))
    assert set(OmegaConf.load(Path(CONF_DIR) / "optimizer/adamw.yaml")) == set(dataclasses.asdict(OptimizerConfig()))


def test_hash_and_run_directory_follow_what_matters():
    cfg = composed()
    same = composed("data.workers=0", "tracking=none", "trainer.log_every=1", "run_dir=x", "eval.test=false")
    other = composed("optimizer.lr=2e-5")
    assert config_hash(cfg) == config_hash(same) != config_hash(other)
    assert diff_configs(cfg, same) == []
    assert diff_configs(cfg, other) == ["optimizer.lr: 1e-05 -> 2e-05"]
    assert resolve_run_dir(cfg) == Path("runs") / f"default-{config_hash(cfg)[:8]}"
    assert resolve_run_dir(same) == Path("x")


def test_a_run_directory_takes_only_its_own_configuration(tmp_path):
    cfg = composed(f"run_dir={tmp_path / 'run'}")
    assert prepare_run_dir(cfg) == tmp_path / "run"
    assert read_config(tmp_path / "run") == cfg
    written = (tmp_path / "run" / "config.yaml").read_text()
    prepare_run_dir(composed(f"run_dir={tmp_path / 'run'}", "data.workers=0"))
    assert (tmp_path / "run" / "config.yaml").read_text() == written
    with pytest.raises(ConfigError, match=r"another configuration: bridge._target_: .*AddBridge -> .*; seed: 0 -> 1"):
        prepare_run_dir(composed(f"run_dir={tmp_path / 'run'}", "seed=1", "bridge=none"))


def test_an_unwritable_run_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        prepare_run_dir(composed(f"run_dir={tmp_path / 'file' / 'run'}"))
    with pytest.raises(ConfigError, match="run_dir=/proc/bt cannot be written"):
        prepare_run_dir(composed("run_dir=/proc/bt"))


def test_secrets_are_used_but_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("BT_TEST_URI", "http://user:hunter2@server")
    cfg = composed(f"run_dir={tmp_path / 'run'}", "tracking.uri=${oc.env:BT_TEST_URI}", "name=a-${seed}")
    assert cfg.tracking.uri == "http://user:hunter2@server"
    prepare_run_dir(cfg)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "hunter2" not in text and "uri: ${oc.env:BT_TEST_URI}" in text and "name: a-0" in text
    assert read_config(tmp_path / "run").tracking.uri == "http://user:hunter2@server"
    chained = OmegaConf.create({"a": "${oc.env:BT_TEST_URI}", "b": "${a}/x", "c": {"d": "${b}"}, "e": ["${c}", 1]})
    assert "hunter2" not in str(record(chained)) and record(chained)["b"] == "${a}/x"


def test_a_run_directory_without_or_with_a_broken_configuration(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("optimizer: {lrr: 1}")
    with pytest.raises(ConfigError, match="config.yaml.*lrr"):
        read_config(tmp_path)
