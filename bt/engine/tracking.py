"""The journal of a run, and its mirror in MLflow.

metrics.jsonl is written first and is the truth; a thread sends it on. Training neither waits for the store nor fails
with it: what could not be sent stays in the run directory and goes out when the store is back, when the run is
continued, or with `python -m bt.sync --run-dir DIR`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bt.config import TrackingConfig, read_config
from bt.engine.members import member_of_job
from bt.engine.mlflow_store import JOURNAL, Cursor, Sender, default_uri, without_secrets
from bt.errors import DataError, UserError

log = logging.getLogger("bt.tracking")
SEND_EVERY = 5.0  # seconds between requests; lines in between go out together
RETRY_EVERY = 15.0  # seconds between attempts while the store does not answer
FINISH_WITHIN = 60.0  # seconds that the end of a run waits for the rest to be sent
STOP_WITHIN = 10.0  # the same for a run that was stopped or failed: a job that is pre-empted has little time
FINISH_ATTEMPTS = 3  # a store that others write to may be busy for a moment


class Journal:
    """metrics.jsonl: one JSON object per line with `step`, in the order of the steps."""

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / JOURNAL

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, with the time of day (seconds) as `time`. Raises UserError on a full disk."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error

    def cut(self, step: int) -> None:
        """Removes the lines after `step`, and one that was not written to its end."""
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        temporary = self.path.with_name(f".{JOURNAL}-{os.getpid()}")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        for number, line in enumerate(whole, 1):
            try:
                json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path} line {number} is not a line of metrics: {line[:60]!r}") from error
        return whole


class Mirror:
    """Sends the journal to MLflow from a thread; with tracking.kind=none it does nothing.

    tags: what describes the run beside its configuration (git revision, environment), sent once. A continued run
    cuts its journal before this is made. sweep_dir: of the sweep that the run is a member of, whose run in MLflow is
    its parent; None keeps what the run directory says.
    """

    def __init__(
        self, cfg: TrackingConfig, run_dir: Path, name: str, tags: Mapping[str, str], sweep_dir: Path | None = None
    ):
        self.enabled = cfg.kind == "mlflow"
        self.run_dir = Path(run_dir)
        if not self.enabled:
            return
        self.uri = default_uri(cfg.uri)
        try:
            self.cursor = Cursor(run_dir)
            self.cursor.set(tags=dict(tags), experiment=cfg.experiment, name=name, final=None, sent=None)
            if sweep_dir is not None:
                self.cursor.set(sweep=os.path.relpath(sweep_dir, run_dir), member=member_of_job())
            (self.run_dir / JOURNAL).touch()
        except OSError as error:  # a full disk, such as any that tracking may not end the training with
            log.warning(
                f"tracking: {error.filename or self.run_dir} cannot be written ({error.strerror}); training goes on "
                f"without it, later: python -m bt.sync --run-dir {self.run_dir}"
            )
            self.enabled = False
            return
        self.sender = Sender(self.run_dir, self.cursor, self.uri, cfg.experiment, name, cfg.timeout_seconds)
        self.unreachable = False
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    @property
    def run_id(self) -> str | None:
        """The run in the store; None as long as there is none."""
        return self.cursor.get("run_id") if self.enabled else None

    def finish(self, status: str, artifacts: Sequence[Path] = (), tags: Mapping[str, str] | None = None) -> bool:
        """Sends the rest and closes the run as "FINISHED" or "FAILED"; True when all of it has been sent.

        artifacts: files in the run directory. Waits a bounded time; what is left is named with the command for it.
        """
        if not self.enabled:
            return True
        names = [str(Path(path).relative_to(self.run_dir)) for path in artifacts]
        try:
            self.cursor.set(final={"status": status, "artifacts": names, "tags": dict(tags or {})})
        except OSError as error:
            log.warning(f"tracking: {self.cursor.path} cannot be written: {error.strerror}")
        self.ending.set()
        self.thread.join(FINISH_WITHIN if status == "FINISHED" else STOP_WITHIN)
        sent = bool(self.cursor.get("sent"))
        if not sent:
            log.warning(
                f"tracking: not everything is in {without_secrets(self.uri)}; when it answers again: "
                f"python -m bt.sync --run-dir {self.run_dir}"
            )
        return sent

    def _work(self) -> None:
        while not self.ending.is_set():
            ok = self._attempt()
            self.ending.wait(SEND_EVERY if ok else RETRY_EVERY)
        for attempt in range(FINISH_ATTEMPTS):
            if attempt:
                time.sleep(min(1.0, RETRY_EVERY))
            if self._attempt():
                return

    def _attempt(self) -> bool:
        try:
            self.sender.send()
        except Exception as error:  # nothing that a store does may end the training
            if not self.unreachable:
                log.warning(
                    f"tracking: {without_secrets(self.uri)} does not take the run ({_reason(error)}); training goes "
                    f"on, {JOURNAL} keeps everything and is sent later"
                )
            self.unreachable = True
            return False
        if self.unreachable:
            log.info(f"tracking: {without_secrets(self.uri)} answers again, all has been sent")
        self.unreachable = False
        return True


def close(run_dir: Path, status: str) -> None:
    """Ends the run in the store of one whose training never came so far, as "FAILED" or "KILLED"; else nothing."""
    cursor = Cursor(run_dir)
    if cursor.get("run_id") and not cursor.get("final") and not cursor.get("sent"):
        cfg = read_config(run_dir)
        Mirror(cfg.tracking, run_dir, cfg.name, cursor.get("tags", {})).finish(status)


def _reason(error: Exception) -> str:
    text = without_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
