"""`python -m bt.bench plan`: its arithmetic against real steps. Its --check, which takes longer, compares memory."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bt.bench import plan, plan_check
from bt.bench.models import Size
from bt.bench.plan import memory, network, trace
from bt.engine.distributed import World
from bt.models.checkpointing import MODES

SMALL = Size(width=64, depth=2, heads=1, image=32, cross_layers=2, vocabulary=200)


@pytest.fixture
def four():
    """Rank 0 of four whose others are not there: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield World(0, 4, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_bytes_that_a_rank_sends_with_shards(four, accumulation):
    work = {"parallel": "fsdp", "accumulation": accumulation, "micro_batch": 2, "tokens": 12, "checkpointing": "none"}
    counted = plan_check.steps(SMALL, four, work)
    traced = trace(SMALL, 12, "fp32")
    # Weights whose rows do not divide by the ranks are padded.
    assert network(traced, "fsdp", 4, accumulation) == pytest.approx(counted, rel=0.02)
    # Of two layers each. The first cross-modal layer of a modality is called once more for each of its inputs, for what
    # passes share; MLM reads no image in the last one.
    assert traced.calls == [1, 1, 1, 1, 4, 2, 3, 1]


def test_activations_grow_with_pairs_and_shrink_with_checkpointing():
    plain, cheap, full = (trace(SMALL, 12, "fp32", checkpointing) for checkpointing in MODES)
    assert plain.parameters == cheap.parameters == full.parameters and plain.flops == cheap.flops == full.flops
    assert 0 < full.per_pair < 0.5 * plain.per_pair and full.per_pair < cheap.per_pair < 0.75 * plain.per_pair
    model, batch = plan.make_model(SMALL), plan.make_batch(SMALL, 3, 1, (12, 12))
    kept, _, flops = plan._forward(model, batch, "fp32")
    assert plain.fixed + 3 * plain.per_pair == pytest.approx(kept, rel=0.01)
    assert 3 * plain.flops == pytest.approx(flops, rel=0.01)
    sizes = [memory(plain, *where, micro_batch=2, accumulation=1) for where in (("ddp", 8), ("fsdp", 8), ("fsdp", 64))]
    assert sizes == sorted(sizes, reverse=True)


def test_the_table(capsys):
    plan.main("--devices 1,8 --global-batch 64 --micro-batch 4 --size small --tokens 8".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:5] for row in rows if row[:1] in (["-"], ["ddp"], ["fsdp"])] == [
        ["-", "1", "16", "x", "4"],
        ["ddp", "8", "2", "x", "4"],
        ["fsdp", "8", "2", "x", "4"],
    ]
    with pytest.raises(SystemExit):
        plan.main("--devices 3 --global-batch 64".split())
