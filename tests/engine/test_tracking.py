"""The journal and its mirror in a real MLflow store (SQLite): every point once, and training never waits."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bt.config import Config, TrackingConfig, write_config
from bt.engine import mlflow_store, tracking
from bt.engine.mlflow_store import Cursor, Sender, make_client, without_secrets
from bt.engine.tracking import Journal, Mirror
from bt.errors import DataError, UserError
from bt.sync import sync
from tests.engine.writers import check_store, write_side_by_side


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a store and a client of it; making its tables takes seconds, so there is one for all tests."""
    place = tmp_path_factory.mktemp("store")
    previous = os.getcwd()
    os.chdir(place)  # MLflow puts artifacts below the working directory
    uri = f"sqlite:///{place / 'mlflow.db'}"
    client = make_client(uri, 5)
    client.create_experiment("bt")
    os.chdir(previous)
    return uri, client


@pytest.fixture
def run(tmp_path):
    """A run directory with its configuration."""
    cfg = Config(name="example")
    cfg.task.metric, cfg.data.dir = "vqa/val/score", "shards"
    write_config(cfg, tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tracking, "SEND_EVERY", 0.05)
    monkeypatch.setattr(tracking, "RETRY_EVERY", 0.05)


def line(step: int) -> dict:
    return {"step": step, "epoch": step / 10, "vqa/train/loss": 1 / step, "lr/base": 0.1 * step}


def history(client, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def once(steps) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in steps]


def test_journal_is_cut_to_a_step_and_to_whole_lines(tmp_path):
    journal = Journal(tmp_path)
    assert journal.records() == []
    for step in range(1, 6):
        journal.append(line(step))
    journal.append({"step": 5, "vqa/val/score": 0.25})
    with open(journal.path, "a") as file:
        file.write('{"step": 6, "los')  # killed while writing
    before = journal.path.read_bytes().splitlines()
    journal.cut(5)
    assert journal.path.read_bytes().splitlines() == before[:6]
    journal.cut(3)
    assert [{k: v for k, v in r.items() if k != "time"} for r in journal.records()] == [line(1), line(2), line(3)]
    assert abs(journal.records()[0]["time"] - time.time()) < 60
    journal.path.write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is not a line of metrics"):
        journal.cut(1)


def test_a_journal_on_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: No space left on device"):
        Journal(tmp_path).append(line(1))


def test_a_full_disk_at_the_start_costs_the_tracking_alone(store, run, said):
    full = run / f".tracking.json-{os.getpid()}"
    full.symlink_to("/dev/full")
    mirror = Mirror(TrackingConfig(uri=store[0]), run, "example", {})
    Journal(run).append(line(1))
    assert mirror.finish("FINISHED") and mirror.run_id is None
    assert len(said) == 1 and "No space left on device" in said[0] and f"bt.sync --run-dir {run}" in said[0]
    full.unlink()
    assert history(store[1], sync(run, store[0]), "vqa/train/loss") == once([1])


def test_a_run_arrives_whole(store, run):
    uri, client = store
    journal = Journal(run)
    journal.append(line(1))
    mirror = Mirror(TrackingConfig(uri=uri), run, "example", {"git_revision": "abc", "device": "cpu"})
    for step in range(2, 30):
        journal.append(line(step))
    journal.append({"step": 29, "vqa/val/score": 0.5, "nested": {"score (yes)": 2}, "text": "no number", "flag": True})
    (run / "curves.png").write_bytes(b"png")
    artifacts = [run / "curves.png", run / "config.yaml"]
    assert mirror.finish("FINISHED", artifacts, {"checkpoint": "checkpoints/best"})
    assert not mirror.thread.is_alive()
    found = client.get_run(mirror.run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "example")
    assert history(client, mirror.run_id, "vqa/train/loss") == once(range(1, 30))
    metrics = {"epoch": 2.9, "vqa/train/loss": 1 / 29, "lr/base": 0.1 * 29, "vqa/val/score": 0.5}
    assert found.data.metrics == metrics | {"nested/score _yes_": 2}
    assert found.data.params["optimizer.lr"] == "1e-05" and found.data.params["data.dir"] == "shards"
    tags = {"git_revision": "abc", "device": "cpu", "checkpoint": "checkpoints/best"}
    assert tags.items() <= found.data.tags.items()
    assert {file.path for file in client.list_artifacts(mirror.run_id)} == {"config.yaml", "curves.png"}


def test_more_than_one_request_holds(store, run, monkeypatch):
    uri, client = store
    monkeypatch.setattr(mlflow_store, "METRICS_PER_BATCH", 7)
    for step in range(1, 21):
        Journal(run).append(line(step))
    run_id = sync(run, uri)
    assert history(client, run_id, "vqa/train/loss") == once(range(1, 21))
    assert history(client, run_id, "lr/base") == [(step, 0.1 * step) for step in range(1, 21)]


def train_until_killed(run: Path, uri: str, start: int) -> None:
    journal = Journal(run)
    mirror = Mirror(TrackingConfig(uri=uri), run, "example", {})
    for step in range(start, 10**6):
        journal.append(line(step))
        if step % 10 == 0:
            journal.append({"step": step, "vqa/val/score": float(step)})
        time.sleep(0.01)
    mirror.finish("FINISHED")


def test_killed_and_continued_every_point_is_there_once(store, run):
    uri, client = store
    journal = Journal(run)
    for start in (1, 9, 9):
        before = Cursor(run).get("step", 0)
        process = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(run, uri, start))
        process.start()
        deadline = time.monotonic() + 60
        while Cursor(run).get("step", 0) < before + 12:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        # The run goes on from a checkpoint before what the store has already got.
        journal.cut(8)
    first = Cursor(run).get("run_id")
    sent = Cursor(run).get("step")
    mirror = Mirror(TrackingConfig(uri=uri), run, "example", {})
    last = sent + 25
    for step in range(9, last + 1):
        journal.append(line(step))
        if step % 10 == 0:
            journal.append({"step": step, "vqa/val/score": float(step)})
    assert mirror.finish("FINISHED")
    assert mirror.run_id == first and client.get_run(first).info.status == "FINISHED"
    assert history(client, first, "vqa/train/loss") == once(range(1, last + 1))
    assert history(client, first, "vqa/val/score") == [(s, float(s)) for s in range(10, last + 1, 10)]


def test_a_request_whose_answer_was_lost_is_not_repeated(store, run):
    uri, client = store
    journal = Journal(run)
    for step in range(1, 5):
        journal.append(line(step))
    sender = Sender(run, Cursor(run), uri, "bt", "example", 5)
    sender._connect()
    log_batch = sender.client.log_batch
    sender.client.log_batch = lambda *args, **kwargs: (log_batch(*args, **kwargs), kwargs.get("metrics") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sender.send()
    sender.client.log_batch = log_batch
    assert history(client, sender.run_id, "lr/base") == [(s, 0.1 * s) for s in range(1, 5)]
    # Continued after a kill: the same steps with other times of day.
    journal.cut(0)
    for step in range(1, 7):
        journal.append(line(step))
    assert sync(run, uri) == sender.run_id
    assert history(client, sender.run_id, "lr/base") == [(s, 0.1 * s) for s in range(1, 7)]


@pytest.fixture
def silent_server():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def said():
    """What the tracking has told the user."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("bt.tracking")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_store_that_does_not_answer_costs_training_nothing(silent_server, store, run, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    journal = Journal(run)
    start = time.perf_counter()
    mirror = Mirror(TrackingConfig(uri=silent_server), run, "example", {"git_revision": "abc"})
    for step in range(1, 6):
        journal.append(line(step))
    assert time.perf_counter() - start < 1
    deadline = time.monotonic() + 30
    while not mirror.unreachable:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    start = time.perf_counter()
    assert mirror.finish("FAILED") is False
    assert time.perf_counter() - start < 10
    assert len(said) == 2 and "training goes on" in said[0] and f"python -m bt.sync --run-dir {run}" in said[1]
    # When there is a store again, all of it goes there.
    uri, client = store
    run_id = sync(run, uri)
    assert history(client, run_id, "vqa/train/loss") == once(range(1, 6))
    assert client.get_run(run_id).info.status == "FAILED" and client.get_run(run_id).data.tags["git_revision"] == "abc"


def test_a_store_that_comes_back_gets_everything(store, run, said, monkeypatch):
    uri, client = store
    down = threading.Event()
    down.set()
    real = Sender._send_metrics

    def failing(self):
        if down.is_set():
            raise ConnectionError("refused by http://user:hunter2@server")
        real(self)

    monkeypatch.setattr(Sender, "_send_metrics", failing)
    mirror = Mirror(TrackingConfig(uri=uri), run, "example", {})
    for step in range(1, 4):
        Journal(run).append(line(step))
        time.sleep(0.2)
    down.clear()
    assert mirror.finish("FINISHED")
    assert history(client, mirror.run_id, "vqa/train/loss") == once(range(1, 4))
    assert len(said) == 2 and "training goes on" in said[0] and "answers again" in said[1]
    assert "hunter2" not in str(said)


def test_without_tracking_the_journal_can_be_sent_later(store, run):
    uri, client = store
    mirror = Mirror(TrackingConfig(kind="none"), run, "example", {})
    Journal(run).append(line(1))
    (run / "report.json").write_text("{}")
    assert mirror.finish("FINISHED") and mirror.run_id is None
    assert not (run / "tracking.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "bt.sync", "--run-dir", str(run), "--uri", uri],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    assert done.stdout == f"{run} is in the store as run {run_id}\n"
    assert history(client, run_id, "vqa/train/loss") == once([1])
    # Again: nothing is sent twice, and the run stays finished.
    assert sync(run) == run_id and history(client, run_id, "vqa/train/loss") == once([1])
    assert client.get_run(run_id).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "report.json"}


def test_sync_says_what_is_wrong_in_one_line(tmp_path, run):
    with pytest.raises(UserError, match="is not a run directory"):
        sync(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        sync(run)


def test_passwords_are_not_kept_or_shown(run):
    assert without_secrets("http://user:hunter2@server:5000/x") == "http://***@server:5000/x"
    cursor = Cursor(run)
    sender = Sender(run, cursor, "http://user:hunter2@server", "bt", "example", 1)
    sender.client = type("Client", (), {"create_run": lambda *a, **k: _Run(), "get_experiment_by_name": _experiment})()
    sender._connect()
    assert cursor.get("run_id") == "r1" and "hunter2" not in (run / "tracking.json").read_text()


class _Run:
    class info:
        run_id = "r1"


def _experiment(self, name):
    return type("Experiment", (), {"experiment_id": "0"})()


@pytest.mark.timeout(400)
def test_four_writers_at_a_time_to_a_new_sqlite_file(tmp_path):
    """They make its tables at the same time too, and SQLite lets one write at a time."""
    sweep_dir = tmp_path / "sweep"
    sweep_dir.mkdir()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_side_by_side(uri, sweep_dir, 4)
    check_store(make_client(uri, 5), sweep_dir, 4)


def test_a_run_whose_making_was_answered_by_nobody_is_found_again(store, run):
    uri, client = store
    sender = Sender(run, Cursor(run), uri, "bt", "example", 5)
    sender.client = make_client(uri, 5)
    create_run = sender.client.create_run
    sender.client.create_run = lambda *args, **kwargs: create_run(*args, **kwargs) and 1 / 0
    Journal(run).append(line(1))
    with pytest.raises(ZeroDivisionError):
        sender.send()
    key = Cursor(run).get("key")
    found = client.search_runs([client.get_experiment_by_name("bt").experiment_id], f"tags.`bt.key` = '{key}'")
    assert [one.info.run_id for one in found] == [sync(run, uri)]


def test_a_sweep_ends_with_its_last_member(store, tmp_path):
    uri, client = store
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        cfg = Config(name=f"member{number}")
        cfg.task.metric, cfg.data.dir = "vqa/val/score", "shards"
        write_config(cfg, tmp_path / str(number))
    # One waits, as submission leaves it; one goes on and one ends.
    waiting = Cursor(tmp_path / "2")
    waiting.set(sweep="..")
    scheduled = Sender(tmp_path / "2", waiting, uri, "bt", "member2", 5).register()
    parent = client.get_run(scheduled).data.tags["mlflow.parentRunId"]
    assert client.get_run(scheduled).info.status == "SCHEDULED"
    for number, status in ((0, "FINISHED"), (1, "FAILED"), (2, "FINISHED")):
        assert client.get_run(parent).info.status == "RUNNING"
        mirror = Mirror(TrackingConfig(uri=uri), tmp_path / str(number), "m", {}, sweep_dir=tmp_path)
        Journal(tmp_path / str(number)).append(line(1))
        assert mirror.finish(status)
    assert mirror.run_id == scheduled and client.get_run(parent).info.status == "FAILED"
