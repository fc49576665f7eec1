"""Sweeps on a real SLURM of two nodes: real sbatch, preemption, time limits, a node that dies.

All that can run side by side is submitted at once (the fixture `submitted`), because a job's start takes seconds.
"""

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from launchers import states
from launchers.sweep import find, read
from tests.launchers.helpers import TINY, journal, lines, logged_steps, run, slow, start, steps, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
SECRET = "hunter2"
# Passed on literally: as an option of sbatch, and as a value of the configuration.
EVIL = 'it\'s a "job" $(touch {mark})'


def quoted(text: str) -> str:
    """A value in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def on(node: str) -> str:
    return f"+hydra.launcher.additional_parameters.nodelist={node}"


class Submitted:
    """What has been submitted in the directory `root`, each to one sweep."""

    def __init__(self, root: Path, data: Path, port: int):
        self.root, self.port, self.mark = root, port, root / "mark"
        self.store = {"BT_TEST_STORE": f"http://user:{SECRET}@127.0.0.1:{port}"}
        evil = EVIL.format(mark=self.mark)
        # Six members, two at a time, whose MLflow server is down; the one with micro-batches of 3 fails in its job.
        self.six = [
            *TINY, f"data.dir={data}", "trainer.micro_batch=8,4,3,2,1,null", "hydra/launcher=slurm", on("n1"),
            "hydra.launcher.array_parallelism=2", f"hydra.launcher.name={quoted(evil)}",
            "tracking.uri=${oc.env:BT_TEST_STORE}", f"tracking.experiment={quoted(evil)}",
        ]  # fmt: skip
        plain = [f"data.dir={data}", "tracking=none", "hydra/launcher=slurm"]
        self.limited = [
            *steps(450), *slow(0.1), *plain, on("n1"), "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=5"
        ]  # fmt: skip
        self.pair = [*steps(200), *slow(0.2), *plain, on("n2"), "seed=0,1", "hydra.sweep.dir=sweeps/pair"]
        self.data = data

    def submit(self, name: str, overrides: list[str]) -> subprocess.CompletedProcess:
        return run("launchers", "submit", "--name", name, *overrides, cwd=self.root, **self.store)


@pytest.fixture(scope="module")
def submitted(cluster, tmp_path_factory, few_dir):
    root = tmp_path_factory.mktemp("sweeps")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    made = Submitted(root, few_dir, port)
    before = os.umask(0o027)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        began = time.monotonic()
        made.answers = {"six": made.submit("six", made.six)}
        made.seconds = time.monotonic() - began
        made.waiting = start("bt.train", "-m", *made.pair, cwd=root)
        made.answers["limited"] = made.submit("limited", made.limited)
        for answer in made.answers.values():
            assert answer.returncode == 0, answer.stderr
        yield made
        os.umask(before)
        if made.waiting.poll() is None:
            made.waiting.kill()


def test_a_killed_member_is_shown_and_a_dead_node_is_survived(submitted, cluster):
    """A multirun in the foreground: it neither waits for ever nor ends the other member."""
    until(lambda: (submitted.root / "sweeps/pair/jobs.json").exists(), 90, "the pair is submitted")
    pair = find("pair")
    killed, moved = pair.members.values()
    for member in (killed, moved):
        until(lambda m=member: len(logged_steps(m.run_dir)) > 45, 120, f"{member.label} has saved twice")
    jobs = pair.jobs()
    cluster.command("scancel", "--signal=KILL", jobs[killed.key][-1])
    until(lambda: states.of(pair)[killed.key].ended, 30, "the killed member is noticed")
    state = states.of(pair)[killed.key]
    # SLURM sends SIGTERM before, and the run may have had the time to save.
    assert state.word in ("cancelled", "killed") and state.step >= 45
    before = len(logged_steps(moved.run_dir))
    cluster.script("stop-node", "n2")
    until(lambda: "down" in cluster.command("sinfo", "-h", "-n", "n2", "-o", "%T"), 90, "n2 is down")
    until(lambda: states.of(pair)[moved.key].word == "requeued", 60, "the other member is requeued")
    cluster.command("scontrol", "update", f"jobid={jobs[moved.key][-1]}", "reqnodelist=n1")
    # It goes on in the same job; `retry` submits the killed one alone.
    retry(submitted)
    until(lambda: states.of(pair)[moved.key].word == "running", 90, "the other member goes on")
    cluster.script("start-node", "n2")
    until(lambda: states.of(pair)[killed.key].word == "running", 90, "it trains again")
    until(lambda: len(logged_steps(killed.run_dir)) > state.step + 10, 60, "it has gone on")
    os.kill(json.loads((killed.run_dir / "heartbeat.json").read_text())["pid"], signal.SIGKILL)  # as for lack of memory
    until(lambda: states.of(pair)[killed.key].ended, 30, "it is noticed again")
    state = states.of(pair)[killed.key]
    assert (state.word, state.why) == ("killed", "ended without a word (SLURM: FAILED)")
    retry(submitted)
    until(lambda: all(s.word == "finished" for s in states.of(pair).values()), 150, "both have finished")
    assert pair.jobs()[moved.key] == jobs[moved.key] and len(pair.jobs()[killed.key]) == 3
    for member in (killed, moved):
        assert logged_steps(member.run_dir) == list(range(1, 201))
    beat = json.loads((moved.run_dir / "heartbeat.json").read_text())
    assert (beat["state"], beat["attempt"], beat["step"]) == ("finished", 1, 200)
    log = Path(pair.dir, ".submitit", jobs[moved.key][-1]).glob("*_log.out")
    text = "".join(path.read_text() for path in log)
    resumed = int(text.split("continuing at step ")[1].split()[0])
    assert resumed % 20 == 0 and 0 < resumed <= before + 20
    out, err = submitted.waiting.communicate(timeout=60)
    # It stopped waiting for the killed member, unless `retry` was quick enough to make it whole.
    assert (submitted.waiting.returncode, "1 of the sweep's members failed" in err) in ((1, True), (0, False)), err


def retry(submitted) -> None:
    done = run("launchers", "retry", "pair", cwd=submitted.root)
    assert done.returncode == 0 and "1 of 2 submitted" in done.stdout, done.stderr


def test_what_slurm_refuses_is_one_line(submitted, cluster):
    words = [*TINY, f"data.dir={submitted.data}", "tracking=none", "hydra/launcher=slurm"]
    answer = submitted.submit("refused", [*words, "hydra.launcher.partition=nosuch"])
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1, answer.stderr
    assert answer.stderr.startswith("error: sbatch refuses: ") and "invalid partition" in answer.stderr
    assert not find("refused").jobs()


def test_six_members_two_at_a_time(submitted, cluster):
    """One fails in its job alone; the store comes up in the middle; no secret is written, and no word is a command."""
    answer = submitted.answers["six"].stdout
    assert "6 of 6 submitted" in answer and submitted.seconds < 120
    six = find("six")
    jobs = [entries[-1] for entries in six.jobs().values()]
    assert len({job.split("_")[0] for job in jobs}) == 1, "one array"
    most = 0

    def running() -> int:
        found = cluster.command("squeue", "-h", "-r", "-t", "running", "-j", jobs[0].split("_")[0], "-o", "%i|%j")
        rows = [row for row in found.splitlines() if row]
        assert all(row.split("|")[1] == EVIL.format(mark=submitted.mark) for row in rows), rows
        return len(rows)

    server = None
    try:
        found = states.of(six)
        while not all(state.ended for state in found.values()):
            most = max(most, running())
            if server is None and sum(state.word == "finished" for state in found.values()) >= 2:
                server = mlflow_server(submitted)
            time.sleep(0.5)
            found = states.of(six)
        server = server or mlflow_server(submitted)
        assert most <= 2
        check_six(submitted, six, found)
    finally:
        if server:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def check_six(submitted, six, found) -> None:
    words = {six.members[key].label: state.word for key, state in found.items()}
    assert words.pop("trainer.micro_batch=3") == "failed" and set(words.values()) == {"finished"} and len(words) == 5
    shown = run("launchers", "status", "six", cwd=submitted.root).stdout
    assert "(trainer.micro_batch=3) failed: global_batch=8 is not a multiple of 1 ranks x" in shown
    assert "5 finished, 1 failed" in shown and "3/3" in shown and "vqa/val/score" in shown
    logs = run("launchers", "logs", "six", cwd=submitted.root).stdout
    assert logs.count("finished; ") == 5 and "error: global_batch=8" in logs
    # What the store missed arrives, each point once, in one run per member below the sweep's.
    sent = run("launchers", "sync", "six", cwd=submitted.root, **submitted.store)
    assert sent.returncode == 0, sent.stderr
    client = MlflowClient(f"http://127.0.0.1:{submitted.port}")
    experiment = client.get_experiment_by_name(EVIL.format(mark=submitted.mark)).experiment_id
    runs = client.search_runs([experiment])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_name for r in parents] == ["six"] and parents[0].info.status == "FINISHED"
    children = {json.loads((m.run_dir / "tracking.json").read_text()).get("run_id"): m for m in six.members.values()}
    children.pop(None)  # the one that failed had nothing to send
    assert {r.info.run_id for r in runs} - {parents[0].info.run_id} == set(children) and len(children) == 5
    for run_id, member in children.items():
        tracked = client.get_run(run_id)
        assert tracked.data.tags["mlflow.parentRunId"] == parents[0].info.run_id and tracked.info.status == "FINISHED"
        points = [(p.step, p.value) for p in client.get_metric_history(run_id, "vqa/train/loss")]
        wanted = [(line["step"], line["vqa/train/loss"]) for line in journal(member.run_dir) if "lr/base" in line]
        assert sorted(points) == wanted and len(wanted) == 3
    check_files(submitted, six)


def check_files(submitted, six) -> None:
    assert not submitted.mark.exists()
    files = [path for path in six.dir.rglob("*") if not path.is_symlink()]
    scripts = [path for path in files if path.name.endswith("_submission.sh")]
    assert len(scripts) == 1 and len(files) > 60
    for path in files:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o027, f"{path} has not the umask's mode"
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert "${oc.env:BT_TEST_STORE}" in (next(iter(six.members.values())).run_dir / "config.yaml").read_text()


def mlflow_server(submitted) -> subprocess.Popen:
    where = submitted.root / "server"
    where.mkdir()
    words = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(submitted.port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{where}/mlflow.db",
        "--artifacts-destination", str(where / "files"),
    ]  # fmt: skip
    with open(where / "log", "w") as log:
        server = subprocess.Popen(words, cwd=where, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def answers() -> bool:
        assert server.poll() is None, (where / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", submitted.port)) == 0

    until(answers, 90, "the MLflow server answers")
    return server


def test_the_same_sweep_again_submits_only_what_is_missing(submitted, cluster):
    again = submitted.submit("six", submitted.six)
    assert again.returncode == 0 and "1 of 6 submitted" in again.stdout, again.stderr
    assert again.stdout.count("finished") == 5 and again.stdout.count("submitted again") == 1
    done = run("launchers", "cancel", "six", cwd=submitted.root)
    assert done.returncode == 0 and "cancelled 1 of 6" in done.stdout, done.stderr
    six = find("six")
    key = next(key for key, member in six.members.items() if member.label == "trainer.micro_batch=3")
    until(lambda: states.of(six)[key].ended, 30, "the member is cancelled")
    # A job that is cancelled gets SIGTERM too, and must not put itself into the queue again.
    time.sleep(2)
    assert states.of(six)[key].word in ("cancelled", "failed")


def test_a_time_limit_shorter_than_the_run(submitted, cluster):
    """Requeued until finished, although Submitit counts signals in jobs of ten minutes and less as time-outs."""
    limited = find("limited")
    (member,) = limited.members.values()
    until(lambda: states.of(limited)[member.key].word == "finished", 300, "the run has finished")
    assert logged_steps(member.run_dir) == list(range(1, 451))
    beat = json.loads((member.run_dir / "heartbeat.json").read_text())
    assert beat["attempt"] >= 1 and len(limited.jobs()[member.key]) == 1
    (log,) = Path(limited.dir, ".submitit", beat["job"]).glob("*_log.out")
    text = log.read_text()
    assert text.count("requeueing job") == beat["attempt"]
    # Nothing is lost: each attempt goes on where the one before said that it stopped.
    stopped, continued = turns(text)
    # A signal after the last step finds nothing to save: the next attempt evaluates again.
    assert stopped and stopped == [step for step in continued if step < 450]


def turns(text: str) -> tuple[list[int], list[int]]:
    """Steps at which a run says that it stopped, and those at which it says that it goes on."""
    stopped = text.split("stopped by a signal after step ")[1:]
    continued = text.split("continuing at step ")[1:]
    return [int(part.split(";")[0]) for part in stopped], [int(part.split()[0]) for part in continued]


def test_two_nodes_pre_empted_at_a_random_step_give_the_same_bits(submitted, cluster):
    """One job of a rank on each node, by SLURM's variables; `high` takes both nodes away in the middle."""
    settings = [*steps(150, every=1000), *slow(0.03), f"data.dir={submitted.data}", "tracking=none"]
    answer = submitted.submit("two", [*settings, "hydra/launcher=slurm", "hydra.launcher.nodes=2"])
    assert answer.returncode == 0, answer.stderr
    two = find("two")
    (member,) = two.members.values()
    step = random.randrange(3, 120)
    until(lambda: len(logged_steps(member.run_dir)) >= step, 120, f"step {step}")
    cluster.command("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    words = ["--standalone", "--nproc-per-node=2", "-m", "bt.train", *settings, "run_dir=whole"]
    whole = run("torch.distributed.run", *words, cwd=submitted.root)
    assert whole.returncode == 0, whole.stderr
    until(lambda: states.of(two)[member.key].word == "finished", 150, "the run has finished")
    assert lines(member.run_dir) == lines(submitted.root / "whole") and len(lines(member.run_dir)) == 152
    report = json.loads((member.run_dir / "report.json").read_text())
    assert report["world_size"] == 2
    beat = json.loads((member.run_dir / "heartbeat.json").read_text())
    assert beat["attempt"] == 1 and beat["job"] == two.jobs()[member.key][-1]
    for part in ("model", "optimizer"):
        file = f"checkpoints/last/{part}.safetensors"
        one, other = load_file(member.run_dir / file), load_file(submitted.root / "whole" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    # Both nodes took part, and what was done between the checkpoint and the preemption was not done twice.
    outputs = sorted(Path(two.dir, ".submitit", beat["job"]).glob("*_log.out"))
    assert len(outputs) == 2 and "node=1(2)" in outputs[1].read_text()
    stopped, continued = turns(outputs[0].read_text())
    assert stopped == continued and len(stopped) == 1


def test_a_sweep_is_read_as_it_was_written(submitted):
    assert read(submitted.root / "sweeps/six") == find("six") and len(find("six").members) == 6
