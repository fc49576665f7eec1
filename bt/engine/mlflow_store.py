"""Sends a run directory's journal to MLflow: every point once, whatever was interrupted in between.

Everything that is sent lies in the run directory (metrics.jsonl, config.yaml, tracking.json), so that training and
`python -m bt.sync` do the same, and what could not be sent can be sent later.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bt.config.record import flatten, read_recorded
from bt.engine.members import SUBMITTED, members_of, submitted_label

CURSOR = "tracking.json"
JOURNAL = "metrics.jsonl"
# MLflow's limits for one request.
METRICS_PER_BATCH, PARAMS_PER_BATCH, PARAM_LENGTH = 1000, 100, 500
PARENT, KEY = "mlflow.parentRunId", "bt.key"  # tags: MLflow's own of a child run; ours, which finds a run again
MEMBER, MEMBERS = "bt.member", "bt.members"  # which member of its sweep a run is; of the sweep's run: all, as JSON
TAG_LENGTH = 5000  # of a tag's value in all stores; a sweep with more members to name has no such tag
OPEN = ("RUNNING", "SCHEDULED")
# A fork during an import would leave the child with an import lock that nobody gives back, so forks wait for it.
_importing = threading.RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)


def default_uri(uri: str | None) -> str:
    """The store meant by tracking.uri: null is $MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def without_secrets(uri: str) -> str:
    return re.sub(r"//[^@/]*@", "//***@", uri)


def make_client(uri: str, timeout_seconds: int) -> Any:
    """An MlflowClient whose requests give up after `timeout_seconds`. Importing MLflow takes seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_seconds))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with a password, if the address has one
    with _importing:
        import mlflow.entities
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (otherwise imported at the first request)
        from mlflow import MlflowClient
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _making_tables(uri):
        return MlflowClient(tracking_uri=uri)


def _making_tables(uri: str) -> contextlib.AbstractContextManager[None]:
    """One process at a time opens an SQLite file: those that find it new would all make its tables."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.parent.is_dir():
        return contextlib.nullcontext()
    return locked(path.with_name(f".{path.name}.lock"))


def create_once(client: Any, cursor: Cursor, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    """The id of a new run, or of the one that an attempt made whose answer was lost."""
    key = cursor.get("key")
    if key is None:
        key = uuid.uuid4().hex
        cursor.set(key=key)
    elif found := client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1):
        return found[0].info.run_id
    return client.create_run(experiment_id, run_name=name, tags={**tags, KEY: key}).info.run_id


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes, also of several machines where the file system can do that."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Cursor:
    """tracking.json: the run in the store and how far it has got, written after every step of the sending.

    step, keys: everything before `step` was sent, and at `step` the metrics `keys`. sending: a request was under
    way, so the store must be asked what of it arrived. uri: the store's address, only where it can hold no password.
    key: the run's tag bt.key. sweep: the sweep's directory as seen from the run's; its own cursor has the parent run.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / CURSOR
        self.lock = threading.Lock()
        try:
            self.values: dict[str, Any] = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            self.values = {}  # without it everything is sent to a new run

    def get(self, key: str, default: Any = None) -> Any:
        with self.lock:
            return self.values.get(key, default)

    def set(self, **values: Any) -> None:
        """Changes entries, removes those that are None, and writes the file whole."""
        with self.lock:
            self.values = {k: v for k, v in (self.values | values).items() if v is not None}
            temporary = self.path.with_name(f".{CURSOR}-{os.getpid()}")
            temporary.write_text(json.dumps(self.values, indent=1))
            temporary.replace(self.path)

    def forget_run(self) -> None:
        self.set(run_id=None, store=None, step=None, keys=None, sending=None, described=None)


class Sender:
    """Brings one run in a store up to what is in its directory. Raises whatever MLflow raises."""

    def __init__(self, run_dir: Path, cursor: Cursor, uri: str, experiment: str, name: str, timeout_seconds: int):
        self.run_dir, self.cursor, self.uri = Path(run_dir), cursor, uri
        self.experiment, self.name, self.timeout_seconds = experiment, name, timeout_seconds
        self.client: Any = None
        self.run_id: str | None = None
        self.position = 0

    def send(self) -> None:
        """Everything that is new: the run itself, its description, metrics, and its end."""
        if self.run_id is None:
            self._connect()
        if not self.cursor.get("described"):
            self._describe()
        self._send_metrics()
        final = self.cursor.get("final")
        if final is not None:
            self._finish(final)

    def _connect(self) -> None:
        self.client = self.client or make_client(self.uri, self.timeout_seconds)
        digest = self._digest()
        run_id = self.cursor.get("run_id")
        if run_id and self.cursor.get("store") != digest and not self._has(run_id):
            self.cursor.forget_run()
            run_id = None
        if run_id is None:
            experiment_id = self._experiment_id()
            run_id = create_once(self.client, self.cursor, experiment_id, self.name, self._place())
        elif not self.cursor.get("final") and not self.cursor.get("sent"):
            self.client.update_run(run_id, status="RUNNING")
        open_address = self.uri if not re.search(r"[@?]", self.uri) else None
        self.cursor.set(run_id=run_id, store=digest, uri=open_address)
        self.position, self.run_id = 0, run_id

    def register(self) -> str:
        """Makes the run in the store for a job that waits to start, and returns its id."""
        self._connect()
        self.client.update_run(self.run_id, status="SCHEDULED")
        return str(self.run_id)

    def _place(self) -> dict[str, str]:
        """Tags of a run that is a member of a sweep: the sweep's run, and which member it is."""
        parent = self._parent()
        if parent is None:
            return {}
        sweep_dir = (self.run_dir / self.cursor.get("sweep")).resolve()
        member = self.cursor.get("member") or submitted_label(self.run_dir, sweep_dir)
        return {PARENT: parent} | ({MEMBER: member} if member else {})

    def _parent(self) -> str | None:
        """The id of the sweep's run in the store, made by the first member that gets here."""
        relative = self.cursor.get("sweep")
        if relative is None:
            return None
        sweep_dir = (self.run_dir / relative).resolve()
        with locked(sweep_dir / ".tracking.lock"):
            cursor, digest = Cursor(sweep_dir), self._digest()
            run_id = cursor.get("run_id")
            if run_id and cursor.get("store") != digest and not self._has(run_id):
                cursor.forget_run()
                run_id = None
            if run_id is None:
                run_id = create_once(self.client, cursor, self._experiment_id(), sweep_dir.name, {"bt.sweep": "true"})
            cursor.set(run_id=run_id, store=digest)
            self._name_members(run_id, sweep_dir)
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def _name_members(self, parent: str, sweep_dir: Path) -> None:
        """Tells the sweep's run which members there are to be."""
        before = json.loads(self.client.get_run(parent).data.tags.get(MEMBERS, "[]"))
        now = members_of(sweep_dir) or []
        # What was submitted stands in one file; Hydra's has the last command alone.
        named = now if (sweep_dir / SUBMITTED).is_file() else [*dict.fromkeys([*before, *now])]
        if named != before and len(text := json.dumps(named)) <= TAG_LENGTH:
            self.client.set_tag(parent, MEMBERS, text)

    def _end_parent(self) -> None:
        """Ends the sweep's run when none of its members goes on or waits."""
        parent = self.client.get_run(self.run_id).data.tags.get(PARENT)
        if parent is None:
            return
        mine = f"tags.`{PARENT}` = '{parent}' AND attributes.status"
        experiment_id = self._experiment_id()
        if any(self.client.search_runs([experiment_id], f"{mine} = '{s}'", max_results=1) for s in OPEN):
            return
        failed = self.client.search_runs([experiment_id], f"{mine} != 'FINISHED'", max_results=1)
        self.client.set_terminated(parent, status="FAILED" if failed else "FINISHED")

    def _digest(self) -> str:
        return hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    def _has(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return self.client.create_experiment(self.experiment)
            except MlflowException:
                # Another run made it in between.
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return found.experiment_id

    def _describe(self) -> None:
        from mlflow.entities import Param, RunTag

        flat = flatten(read_recorded(self.run_dir))
        params = [Param(_clean(key), str(value)[:PARAM_LENGTH]) for key, value in flat.items()]
        tags = [RunTag(key, str(value)) for key, value in self.cursor.get("tags", {}).items()]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])
        self.client.log_batch(self.run_id, tags=tags)
        self.client.log_artifact(self.run_id, str(self.run_dir / "config.yaml"))
        self.cursor.set(described=True)

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        arrived = self._arrived() if self.cursor.get("sending") else set()
        for batch, end in self._batches():
            points = [
                Metric(_clean(k), v, int(at * 1000), step) for step, at, k, v in batch if (step, k) not in arrived
            ]
            if points:
                self.cursor.set(sending=True)
                self.client.log_batch(self.run_id, metrics=points)
            if batch:
                step = batch[-1][0]
                keys = {k for s, _, k, _ in batch if s == step}
                if step == self.cursor.get("step"):
                    keys |= set(self.cursor.get("keys", []))
                self.cursor.set(step=step, keys=sorted(keys))
            self.position = end
        self.cursor.set(sending=None)

    def _arrived(self) -> set[tuple[int, str]]:
        """(step, key) of what is not known to be sent but is in the store."""
        names = {key for batch, _ in self._batches() for _, _, key, _ in batch}
        return {
            (point.step, key) for key in names for point in self.client.get_metric_history(self.run_id, _clean(key))
        }

    def _batches(self) -> Iterator[tuple[list[tuple[int, float, str, float]], int]]:
        """New (step, time, key, value) in portions, each with the journal's byte position after it."""
        step, keys = self.cursor.get("step", -1), set(self.cursor.get("keys", []))
        batch: list[tuple[int, float, str, float]] = []
        end = self.position
        with open(self.run_dir / JOURNAL, "rb") as journal:
            journal.seek(self.position)
            for line in journal:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                points = [
                    (record["step"], record.get("time", 0.0), key, float(value))
                    for key, value in metrics_of(record)
                    if record["step"] > step or (record["step"] == step and key not in keys)
                ]
                if batch and len(batch) + len(points) > METRICS_PER_BATCH:
                    yield batch, end
                    batch = []
                batch += points
                end += len(line)
        if end != self.position:
            yield batch, end

    def _finish(self, final: Mapping[str, Any]) -> None:
        for key, value in final["tags"].items():
            self.client.set_tag(self.run_id, key, value)
        for name in final["artifacts"]:
            if (self.run_dir / name).is_file():
                self.client.log_artifact(self.run_id, str(self.run_dir / name))
        self.client.set_terminated(self.run_id, status=final["status"])
        self._end_parent()
        self.cursor.set(final=None, sent=True)


def metrics_of(record: Mapping[str, Any]) -> Sequence[tuple[str, float]]:
    """(key, value) of every number of a journal line but its step and time; nested keys are joined with '/'."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += [(f"{key}/{inner}", number) for inner, number in metrics_of(value)]
        elif key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((key, value))
    return found


def _clean(key: str) -> str:
    """MLflow's names hold letters, digits, '_', '-', '.', ' ' and '/' only."""
    return re.sub(r"[^\w\-. /]", "_", key)
