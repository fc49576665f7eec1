"""One rank of the released code's two-process case of the given name; test_distributed.py starts it by torchrun."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from bt.data.batch import Batch, Texts
from bt.engine import distributed
from bt.engine.distributed import World
from bt.engine.parallel import Replicas
from bt.tasks.base import TaskModel
from bt.tasks.itc import ITC
from tests.golden_helpers import CONTRASTIVE, difference, golden_tower, load_golden, tensors
from tests.tasks.test_golden import CONTEXT
from tests.tasks.test_golden_retrieval import hard_targets, itm_itc_model

CHECKED = {"image_to_text": "logits_i2t", "text_to_image": "logits_t2i", "logits": "itm_logits"}


def itc_case(world: World, count: int) -> tuple[TaskModel, Tensor, dict]:
    model = load_golden(TaskModel(golden_tower(), {"itc": ITC(CONTEXT, size=CONTRASTIVE)})).train()
    # The case has one-hot targets although images repeat: every image counts as its own.
    return model, torch.arange(count) + world.rank * count, {"itc": {"pair": torch.arange(count)}}


def hard_case(world: World, count: int, case: str) -> tuple[TaskModel, Tensor, dict]:
    model = itm_itc_model(negatives="global" if case.endswith("global") else "local")
    expected = tensors(f"bridgetower/two_process/{case}/outputs")
    ids = tensors(f"bridgetower/two_process/batch_rank{world.rank}")["img_index"]
    hard = hard_targets(expected, f"rank{world.rank}.", world.rank * count)
    return model, ids, {"itc": {"pair": torch.arange(count)}, "itm": hard}


def check_outputs(results: dict, case: str, rank: int) -> None:
    expected = tensors(f"bridgetower/two_process/{case}/outputs")
    found = {key: value for result in results.values() for key, value in result.outputs.items()}
    for own, theirs in CHECKED.items():
        assert difference(found[own], expected[f"rank{rank}.{theirs}"]) <= 1e-5, own
    assert torch.equal(found["images"], expected[f"rank{rank}.negative_image_of_text"])
    assert torch.equal(found["texts"], expected[f"rank{rank}.negative_text_of_image"])


def main() -> None:
    case, out = sys.argv[1:]
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    raw = tensors(f"bridgetower/two_process/batch_rank{world.rank}")
    count = len(raw["text_ids"])
    model, ids, targets = itc_case(world, count) if case == "itc" else hard_case(world, count, case)
    # Rank 1 pads its texts further than rank 0, as real batches of different lengths do.
    texts = Texts(*(torch.nn.functional.pad(raw[key], (0, world.rank), value=fill) for key, fill in TEXTS.items()))
    texts.mask = texts.mask.bool()
    rows = torch.arange(count)
    pairs = torch.stack([rows, rows], 1)
    batch = Batch(raw["image"], texts, pairs, ids, rows + world.rank * count, targets)
    parallel = Replicas(model, world)  # kept: the backward pass of a wrapper that is gone does not synchronise
    results = parallel.forward(batch)
    if case != "itc":
        check_outputs(results, case, world.rank)
    means = {name: result.loss / model.objectives[name].count(targets[name]) for name, result in results.items()}
    sum(means.values()).backward()
    losses = distributed.gather_objects([loss.item() for loss in means.values()])
    if world.main:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        save_file({"losses": torch.tensor(losses), **gradients}, out)
    distributed.leave()


TEXTS = {"text_ids": 1, "text_masks": 0}

if __name__ == "__main__":
    main()
