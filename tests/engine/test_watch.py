"""What ranks tell each other of their failures; both are played in this process, on one store."""

import socket

import pytest
import torch
import torch.distributed as dist

from bt.engine import watch
from bt.engine.watch import OutOfMemory, RankError, Watch
from bt.errors import DataError, Stopped

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
HOST = socket.gethostname()


@pytest.fixture
def ranks(monkeypatch):
    """Ranks 0 and 1, at step 7; `watch.explained` speaks for rank 1."""
    monkeypatch.setattr(watch, "LOOK", 0.4)
    monkeypatch.setattr(watch, "BEAT", 0.1)
    store = dist.HashStore()
    both = [Watch(store, rank, 2, seconds=60) for rank in (0, 1)]
    for rank in both:
        rank.mark(7, "training")
        rank.say()
    monkeypatch.setattr(watch, "_watch", both[1])
    return both


def raised_for(error: Exception) -> Exception:
    with pytest.raises(Exception) as found, watch.explained():
        raise error
    return found.value


@pytest.mark.parametrize(
    "error, told",
    [
        (DataError("shard-3.tar is damaged"), f"rank 1 on {HOST}, step 7, training: shard-3.tar is damaged"),
        (ValueError("no\nlines"), f"rank 1 on {HOST}, step 7, training: ValueError: no"),
    ],
)
def test_an_own_error_is_raised_as_it_is_and_told_to_the_others(ranks, error, told):
    assert raised_for(error) is error
    assert ranks[0].ended() == told
    other = ranks[0].explain(LOST)
    assert isinstance(other, RankError) and str(other) == told
    assert ranks[0].explain(other) is other and ranks[0].ended() == told  # passing a second time


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_rank_host_and_step_everywhere(ranks, error):
    own = raised_for(error)
    assert isinstance(own, OutOfMemory)
    assert str(own).startswith(f"rank 1 on {HOST}, step 7, training: out of memory ({error}); less is needed with")
    assert ranks[0].ended() == str(own)


def test_ranks_that_stop_at_a_signal_are_no_failure(ranks):
    """Rank 0 may still write its checkpoint for minutes, and must not be ended because rank 1 is done."""
    error = Stopped("stopped by a signal after step 7")
    assert raised_for(error) is error
    assert ranks[0].ended() is None


def test_a_rank_that_says_nothing_any_more_is_named(ranks):
    lost = raised_for(LOST)
    assert str(lost).startswith(f"lost at step 7: rank 0 on {HOST}, step 7, training when last heard of (killed, ")
    assert ranks[0].ended() == str(lost)


def test_the_first_reason_counts(ranks):
    ranks[0].end("rank 0 did it")
    assert str(raised_for(LOST)) == "rank 0 did it"
    raised_for(DataError("late"))
    assert ranks[0].ended() == "rank 0 did it"


def test_ranks_that_stand_still_are_named_the_furthest_behind_first(ranks):
    """Rank 1 hangs in step 6; rank 0 waits for it in step 7."""
    ranks[1].state.step, ranks[1].state.at, ranks[1].state.still = 6, "data.py:3 read", 61.0
    ranks[1].say()
    assert ranks[0]._stuck() is None
    ranks[0].listen([1])
    ranks[0].state.at = "loop.py:9 all_sum"
    message = (
        f"rank 1 on {HOST}, step 6, training (data.py:3 read); rank 0 on {HOST}, step 7, training (loop.py:9 all_sum)"
    )
    assert ranks[0]._stuck() == f"no progress in 1 minutes (trainer.timeout_minutes): {message}"
