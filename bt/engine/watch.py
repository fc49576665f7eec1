"""Ranks that keep an eye on each other: one that fails, dies or hangs ends the job with a word on which it was.

A thread in every rank tells the process group's store each second what the rank is doing. Rank 0 reads what all say,
the others what rank 0 says. Nothing here waits for a GPU or takes part in a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bt.errors import Stopped, UserError

BEAT = 1.0  # seconds between two words of a rank
SILENT = 30.0  # seconds without a word after which a rank counts as dead
LOOK = 6.0  # seconds that a rank whose collective failed looks for the reason
GRACE = 15.0  # seconds for the main thread to end by itself, once the job has to end: MLflow is told, files are written
END = "end"
LOST = "lost"  # how the reason begins where a rank went without a word


class RankError(UserError):
    """A rank failed, died or hung; the message names it, its host and its step."""


class OutOfMemory(UserError):
    """The device's memory, or the main memory, is not enough."""

    @staticmethod
    def of(error: Exception) -> OutOfMemory | None:
        """None where `error` is another one. torch raises a plain RuntimeError for the main memory."""
        text = str(error)
        if isinstance(error, UserError):
            return None
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text:
            what = text.splitlines()[0] if text else "main memory"
            less = "a smaller trainer.micro_batch, trainer.gradient_checkpointing=full, trainer.parallel=fsdp"
            where = "" if _watch is None else f"{_watch.state}: "
            return OutOfMemory(f"{where}out of memory ({what}); less is needed with {less}")
        return None


@dataclass
class State:
    """What a rank says of itself. still: seconds in which its main thread has not moved; at: where that is."""

    rank: int
    host: str
    beat: int = 0
    step: int | None = None
    doing: str = "starting"
    still: float = 0.0
    at: str = ""
    left: bool = False

    def __str__(self) -> str:
        step = "" if self.step is None else f" step {self.step},"
        return f"rank {self.rank} on {self.host},{step} {self.doing}"


class Watch:
    """What this rank says, and what it knows of the others. seconds: a rank that stands still so long has hung."""

    def __init__(self, store: dist.Store, rank: int, size: int, seconds: float):
        # A connection of its own: the main thread's may wait for a key while this one has something to say.
        self.store = dist.PrefixStore("bt.watch", store.clone())
        self.size, self.seconds = size, seconds
        self.state = State(rank, socket.gethostname())
        self.marks = 0
        self.main = threading.main_thread().ident
        self.signature: tuple = ()
        self.moved = time.monotonic()
        self.heard: dict[int, tuple[State, float]] = {}  # by rank: its last word, and when it came
        self.stopping = threading.Event()
        self.before_exit: list[Callable[[str], None]] = []
        self.explained: Exception | None = None
        self.say()
        self.thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def mark(self, step: int | None, doing: str) -> None:
        self.marks += 1
        self.state.step, self.state.doing = step, doing

    def say(self) -> None:
        self.state.beat += 1
        self.store.set(str(self.state.rank), json.dumps(asdict(self.state)))

    def stop(self) -> None:
        """This rank leaves in order and is not waited for."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join(2 * BEAT)
        self.state.left = True
        with contextlib.suppress(RuntimeError, OSError):  # rank 0, which had the store, may have left already
            self.say()

    def end(self, reason: str) -> None:
        """Ends the job, for the first reason that a rank gives."""
        self.store.compare_set(END, "", reason)

    def ended(self) -> str | None:
        return self.store.get(END).decode() if self.store.check([END]) else None

    def listen(self, ranks: list[int]) -> None:
        """Reads what some ranks say."""
        now = time.monotonic()
        for text in self.store.multi_get([str(rank) for rank in ranks]) if ranks else []:
            state = State(**json.loads(text))
            known = self.heard.get(state.rank)
            if known is None or known[0].beat != state.beat:
                self.heard[state.rank] = state, now

    def silent(self, seconds: float) -> list[State]:
        """Ranks that have said nothing for so long."""
        now = time.monotonic()
        return [state for state, when in self.heard.values() if not state.left and now - when > seconds]

    def _work(self) -> None:
        others = [rank for rank in range(self.size) if rank != self.state.rank]
        watched = others if self.state.rank == 0 else [0]
        while not self.stopping.wait(BEAT):
            try:
                self._notice_main()
                self.say()
                self.listen(watched)
                if dead := self.silent(SILENT):
                    self.end(self._died(dead))
                if self.state.rank == 0 and (stuck := self._stuck()):
                    self.end(stuck)
                reason = self.ended()
            except (RuntimeError, OSError) as error:
                reason = f"the process group's store is gone ({str(error).splitlines()[0]}): its host or rank 0 died"
            if reason and not self.stopping.wait(GRACE):
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"error: {reason}", file=sys.stderr, flush=True)
                for tell in reversed(self.before_exit):
                    with contextlib.suppress(Exception):
                        tell(reason)
                os._exit(1)

    def _notice_main(self) -> None:
        """Whether the main thread has moved since the last look: another step, or anywhere else in its code."""
        frame = sys._current_frames().get(self.main)
        inner, stack = frame, []
        while frame is not None:
            stack.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        signature = (self.marks, *stack)
        if signature != self.signature:
            self.signature, self.moved = signature, time.monotonic()
        self.state.still = time.monotonic() - self.moved
        if inner is not None:
            code = inner.f_code
            self.state.at = f"{Path(code.co_filename).name}:{inner.f_lineno} {code.co_name}"

    def _stuck(self) -> str | None:
        """The ranks in groups by where they are, the one that is furthest behind first; None while all move."""
        states = [self.state, *(state for state, _ in self.heard.values())]
        if all(state.left or state.still <= self.seconds for state in states):
            return None
        groups: dict[tuple, list[State]] = {}
        for state in states:
            groups.setdefault((state.step or 0, state.doing, state.at), []).append(state)
        order = sorted(groups.values(), key=lambda group: (group[0].step or 0, len(group)))
        shown = [
            f"{group[0]} ({group[0].at}){f' and {len(group) - 1} more there' if len(group) > 1 else ''}"
            for group in order[:4]
        ]
        return f"no progress in {self.seconds / 60:g} minutes (trainer.timeout_minutes): {'; '.join(shown)}"

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error of the main thread: itself, or what happened on the rank that caused it."""
        if error is not self.explained:
            self.explained = self._others_fault(error) if _is_lost_connection(error) else self._own_fault(error)
        return self.explained

    def _own_fault(self, error: Exception) -> Exception:
        text = str(error).splitlines()[0] if str(error) else ""
        where = "" if text.startswith("rank ") else f"{self.state}: "
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self._try_to_end(f"{where}{name}{text}")
        return error

    def _others_fault(self, error: Exception) -> Exception:
        try:
            others = [rank for rank in range(self.size) if rank != self.state.rank]
            self.listen(others)
            began = time.monotonic()
            self.heard = {rank: (state, began) for rank, (state, _) in self.heard.items()}
            while time.monotonic() < began + LOOK:
                if reason := self.ended():
                    return RankError(reason)
                time.sleep(BEAT / 4)
                self.listen(others)
            if dead := self.silent(LOOK - 2 * BEAT):
                reason = self._died(dead)
                self._try_to_end(reason)
                return RankError(reason)
        except (RuntimeError, OSError):
            return RankError(f"{self.state}: rank 0's host is gone ({str(error).splitlines()[0]})")
        return error

    def _died(self, states: list[State]) -> str:
        """Their own last words are up to a beat old, so the step of this rank is named as well."""
        step = "" if self.state.step is None else f" at step {self.state.step}"
        shown = "; ".join(str(state) for state in states[:4])
        more = f" and {len(states) - 4} more" if len(states) > 4 else ""
        return f"{LOST}{step}: {shown} when last heard of{more} (killed, out of memory, or its machine is down)"

    def _try_to_end(self, reason: str) -> None:
        # Where the store's host is gone, the others notice that themselves.
        with contextlib.suppress(RuntimeError, OSError):
            self.end(reason)


def _is_lost_connection(error: Exception) -> bool:
    if isinstance(error, UserError):
        return False
    return isinstance(error, dist.DistError) or re.search(r"gloo|nccl", str(error), re.IGNORECASE) is not None


_watch: Watch | None = None


def start(store: dist.Store, rank: int, size: int, seconds: float) -> None:
    """From now on this rank is watched and watches; every rank must call it."""
    global _watch
    _watch = Watch(store, rank, size, seconds)
    dist.barrier()  # everyone has said a word
    _watch.thread.start()


def stop() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def mark(step: int | None, doing: str) -> None:
    """What this rank is about to do, for messages: mark(12, "reading data")."""
    if _watch is not None:
        _watch.mark(step, doing)


def before_exit(tell: Callable[[str], None]) -> None:
    """Calls tell(reason), from the watch's thread, where it has to end this process because the main thread hangs; the
    last one that was given first."""
    if _watch is not None:
        _watch.before_exit.append(tell)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns an error that another rank caused into one that says which rank, and tells the others of an own one.

    An error may pass several of these. Ranks that stop at a signal do so together, so that is not told.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        reason = OutOfMemory.of(error) or error
        if _watch is not None:
            reason = _watch.explain(reason)
        if reason is error:
            raise
        raise reason from error


def here() -> str:
    """ "rank 3 on host-b: " for messages; nothing where there is one process."""
    return "" if _watch is None else f"rank {_watch.state.rank} on {_watch.state.host}: "
