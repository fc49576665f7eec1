"""What is refused, planned and written before anything runs; what SLURM has forgotten."""

import json
import math

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from bt.config import Config, compose_run, write_config
from bt.config.record import record
from bt.engine import heartbeat
from bt.engine.mlflow_store import Cursor
from launchers import slurm, states
from launchers.__main__ import main
from launchers.actions import register
from launchers.sweep import Member, Sweep, find, short_labels
from tests.launchers.helpers import TINY

SLURM = ["hydra/launcher=slurm"]


class Command:
    """`python -m launchers` in this process: exit status, standard output and error."""

    def __init__(self, monkeypatch, capfd, directory):
        self.monkeypatch, self.capfd = monkeypatch, capfd
        monkeypatch.chdir(directory)

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.argv", ["launchers", *words])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *self.capfd.readouterr()


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    return Command(monkeypatch, capfd, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,1"], "choose hydra/launcher=slurm or hydra/launcher=local"),
        (
            [*SLURM, "hydra.launcher.partitoin=x"],
            "unknown option hydra.launcher.partitoin (did you mean hydra.launcher.pa",
        ),
        ([*SLURM, "hydra.launcher.nodes=two"], "hydra.launcher.nodes=two has the wrong type: must be a whole number"),
        ([*SLURM, "hydra.launcher.nodes=0"], "hydra.launcher.nodes=0 is out of range: must be at least 1"),
        (
            [*SLURM, "hydra.launcher.gpus_per_node=8", "hydra.launcher.tasks_per_node=2"],
            "tasks_per_node=2: each of the",
        ),
        ([*SLURM, 'hydra.launcher.comment="a\nb"'], "hydra.launcher.comment='a\\nb' must be one line"),
        ([*SLURM, "hydra.launcher.setup=['export A=${oc.env:HOME}']"], "use $NAME of the shell"),
        (["hydra/launcher=local", "hydra.launcher.max_parallel=0"], "hydra.launcher.max_parallel=0 is out of range"),
        ([*SLURM, "seed=0,-1"], "member seed=-1: seed=-1 is out of range: must be at least 0; nothing was submitted"),
        ([*SLURM, "seed=0,1", "optimizer.lrr=1"], "unknown option optimizer.lrr (did you mean optimizer.lr?)"),
        ([*SLURM, "data.prefetch=1,2"], "members data.prefetch=1 and data.prefetch=2 are the same run"),
        ([*SLURM, "seed=1,1"], "the same overrides are given twice"),
        (["--name", "a/b", *SLURM], "--name 'a/b' names a directory"),
    ],
)
def test_a_mistake_is_one_line_and_submits_nothing(command, tmp_path, words, said):
    status, _, error = command("submit", *words[:2], *TINY, *words[2:])
    assert status == 1 and said in error and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("sweep.yaml")) and not list(tmp_path.rglob("config.yaml"))


def test_plan_prices_a_sweep_and_leaves_nothing(command, tmp_path, few_dir):
    words = [
        "plan",
        *TINY,
        f"data.dir={few_dir}",
        "trainer.max_steps=null",
        "trainer.epochs=3",
        "data.max_samples=null",
    ]
    words += ["bridge=none,add", "hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=2"]
    status, out, error = command(*words, "--pairs-per-second", "0.5")
    assert status == 0, error
    index = json.loads((few_dir / "index.json").read_text())
    rows = [line.split() for line in out.splitlines() if line.startswith("bridge=")]
    assert [row[:2] for row in rows] == [["bridge=none", "4"], ["bridge=add", "4"]]
    steps = int(rows[0][2])
    assert steps == math.ceil(3 * index["splits"]["train"]["texts"]["questions"] / 8)
    hours = steps * 8 / 0.5 / 3600
    assert float(rows[0][3]) == pytest.approx(hours, abs=1e-4)
    assert int(rows[1][4].replace(",", "")) == 162189, "the parameters that a report of this model names"
    assert f"2 jobs, at most 16 at a time; {2 * 4 * hours:.2f} hours of GPUs" in out
    assert not list(tmp_path.iterdir())
    status, out, _ = command(*words)
    assert status == 0 and "hours of GPUs unknown: give --pairs-per-second or --like RUN_DIR" in out
    # As fast per rank as a run of the same encoders on two ranks.
    like = tmp_path / "like"
    like.mkdir()
    (like / "report.json").write_text(json.dumps({"pairs_per_second": 0.25, "world_size": 2}))
    write_config(compose_run(*TINY, "cross=small"), like)
    assert "has another encoder or cross" in command(*words, "--like", str(like))[2]
    write_config(compose_run(*TINY), like)
    status, out, error = command(*words, "--like", str(like))
    assert status == 0 and f"{2 * 4 * hours:.2f} hours of GPUs" in out, error
    # A batch that does not divide among the ranks is found here, not in the job.
    status, _, error = command(*words, "hydra.launcher.nodes=3", "--pairs-per-second", "1")
    assert status == 1 and "global_batch=8 is not a multiple of 6 ranks" in error


def test_labels_are_what_members_differ_in():
    assert short_labels([["a=1", "b=2"], ["a=1", "b=3"]]) == ["b=2", "b=3"]
    assert short_labels([["a=1", "b=2"]]) == ["-"]


def test_unknown_sweeps_and_members_are_named(command, tmp_path):
    assert command("status", "nosuch")[2] == "error: no sweep nosuch; there are none below sweeps/\n"
    sweep = Sweep(tmp_path / "sweeps/one", tmp_path, "local", {}, {"abc": Member("abc", ("seed=0",), tmp_path, "x")})
    with sweep.lock():
        sweep.write()
    assert find("one").members == sweep.members
    assert "no sweep two; there are: one" in command("logs", "two")[2]
    assert "one has no member xyz: there are abc" in command("status", "one", "xyz")[2]


def test_a_launchers_values_from_the_environment_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("BT_TEST_ACCOUNT", "hunter2")
    config = OmegaConf.create(
        {
            "name": "n",
            "who": "${oc.env:BT_TEST_ACCOUNT}",
            "hydra": {"launcher": {"account": "${who}", "name": "${name}"}},
        }
    )
    launcher = record(config, "hydra.launcher")
    assert launcher == {"account": "${who}", "name": "n"}
    direct = OmegaConf.create({"hydra": {"launcher": {"account": "${oc.env:BT_TEST_ACCOUNT}"}}})
    sweep = Sweep(tmp_path / "s", tmp_path, "slurm", record(direct, "hydra.launcher"))
    with sweep.lock():
        sweep.write()
    assert "hunter2" not in (tmp_path / "s/sweep.yaml").read_text()
    assert find(str(tmp_path / "s")).params() == {"account": "hunter2"}


def test_sync_ends_the_run_of_a_member_that_was_cancelled_before_it_started(command, tmp_path, monkeypatch):
    cfg = Config(name="one")
    cfg.task.metric, cfg.data.dir, cfg.tracking.uri = "vqa/val/score", "shards", f"sqlite:///{tmp_path}/mlflow.db"
    member = Member("abc", ("seed=0",), tmp_path / "sweeps/one/abc", "seed=0")
    member.run_dir.mkdir(parents=True)
    write_config(cfg, member.run_dir)
    sweep = Sweep(tmp_path / "sweeps/one", tmp_path, "slurm", {}, {"abc": member})
    sweep.write()
    sweep.add_jobs({"abc": "7"})
    monkeypatch.setattr(slurm, "states", lambda jobs: {job: slurm.JobState("CANCELLED") for job in jobs})
    Cursor(member.run_dir).set(sweep="..")
    (run_id,) = register(sweep, [member]).values()
    client = MlflowClient(cfg.tracking.uri)
    parent = client.get_run(run_id).data.tags["mlflow.parentRunId"]
    assert [client.get_run(one).info.status for one in (run_id, parent)] == ["SCHEDULED", "RUNNING"]
    status, out, error = command("sync", "one")
    assert status == 0 and out == f"abc: run {run_id}\n", error
    assert [client.get_run(one).info.status for one in (run_id, parent)] == ["KILLED", "FAILED"]


@pytest.mark.parametrize(
    ("beat", "known", "word", "why"),
    [
        ({"state": "running"}, None, "killed", "SLURM has forgotten it"),
        ({"state": "failed", "error": "no space"}, None, "failed", "no space"),
        ({"state": "running"}, "OUT_OF_MEMORY", "out of memory", ""),
        ({"state": "running"}, "TIMEOUT", "timed out", ""),
        ({"state": "running"}, "NODE_FAIL", "killed", ""),
        ({"state": "stopped"}, "CANCELLED", "cancelled", ""),
        ({"state": "running"}, "CANCELLED", "killed", "without a word"),
        ({}, "CANCELLED", "cancelled", ""),
        ({"state": "stopped"}, "PENDING", "requeued", ""),
        ({}, "PENDING", "waiting", ""),
        ({}, "FAILED", "failed", "before it started (FAILED)"),
        ({"state": "running"}, "RUNNING", "running", ""),
        ({"state": "running", "time": 0}, "RUNNING", "running", "no step for"),
        ({"state": "finished"}, "COMPLETING", "ending", ""),
        ({"state": "running", "job": "8"}, "RUNNING", "starting", ""),
    ],
)
def test_the_state_of_a_member_when_both_have_their_say(tmp_path, monkeypatch, beat, known, word, why):
    """SLURM's word and the heartbeat of the same job; sacct does not answer here."""
    member = Member("abc", ("seed=0",), tmp_path / "abc", "seed=0")
    member.run_dir.mkdir()
    sweep = Sweep(tmp_path, tmp_path, "slurm", {}, {"abc": member})
    sweep.add_jobs({"abc": "7"})
    monkeypatch.setenv("BT_JOB", "7")
    if beat:
        heartbeat.write(member.run_dir, **beat)
    answers = {"7": slurm.JobState(known)} if known else {}
    monkeypatch.setattr(slurm, "states", lambda jobs: {job: answers[job] for job in jobs if job in answers})
    state = states.of(sweep)["abc"]
    assert state.word == word and why in state.why, state
