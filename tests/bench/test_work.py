"""Work must not grow: operations, passes of the encoders and host waits of a step, against the committed figures."""

import json

import pytest
import torch

from bt.bench.work import COMMITTED, TASKS, SyncCounter, of_retrieval, of_task

FIGURES = json.loads(COMMITTED.read_text())


@pytest.mark.parametrize("task", [*TASKS, "retrieval"])
def test_no_more_work_than_committed(task):
    found = of_retrieval() if task == "retrieval" else of_task(task)
    more = {key: (count, FIGURES[task][key]) for key, count in found.items() if count > 1.001 * FIGURES[task][key]}
    assert not more, f"{task} does more than bt/bench/work.json says (python -m bt.bench.work --write, if it has to)"
    assert found["vision_calls"] == 1 and found["flop"] > 0.98 * FIGURES[task]["flop"]


def test_every_committed_task_is_counted():
    assert FIGURES.keys() == {*TASKS, "retrieval"}


def test_waits_are_counted():
    numbers = torch.arange(4)
    with SyncCounter() as counter:
        numbers.sum().item(), numbers[numbers > 1], torch.equal(numbers, numbers), numbers.nonzero(), numbers + 1
    assert counter.count == 4
