"""What objectives share of a batch's encoding."""

import pytest
import torch

from bt.bench.models import SIZES, make_batch, make_model, pretraining_objectives
from bt.tasks.base import Shared


@pytest.fixture
def model():
    return make_model(SIZES["tiny"], pretraining_objectives)


def passes(model, batch, *names: str) -> tuple[list[int], list[float]]:
    """Rows of each call of the text encoder, and the losses, of these objectives together."""
    rows = []
    handle = model.tower.text.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    shared = Shared(model.tower, batch, {name: model.objectives[name] for name in names})
    losses = [shared.result(name).loss.item() for name in names]
    handle.remove()
    return rows, losses


def test_all_texts_pass_their_encoder_at_once(model):
    """ITM's and the masked ones of MLM together; alone each encodes its own and no other."""
    batch = make_batch(SIZES["tiny"], 3, 2)
    batch.pairs, batch.texts.ids, batch.texts.mask = batch.pairs[:4], batch.texts.ids[:5], batch.texts.mask[:5]
    batch.targets["itm"] = {name: rows[:4] for name, rows in batch.targets["itm"].items()}
    mlm = batch.targets["mlm"]
    kept = mlm["positions"][:4].sum()
    batch.targets["mlm"] = {name: rows[:4] for name, rows in mlm.items()} | {"labels": mlm["labels"][:kept]}
    rows, together = passes(model, batch, "mlm", "itm")
    (of_mlm, mlm_alone), (of_itm, itm_alone) = passes(model, batch, "mlm"), passes(model, batch, "itm")
    assert (rows, of_mlm, of_itm) == ([9], [4], [5])
    torch.testing.assert_close(torch.tensor(together), torch.tensor(mlm_alone + itm_alone), rtol=1e-6, atol=0)
