"""The objectives against the released code's losses, logits and gradients of every parameter."""

from types import SimpleNamespace

import pytest
import torch

from bt.data.batch import Batch, Texts
from bt.engine.distributed import World
from bt.engine.loop import Trainer
from bt.engine.parallel import Parallel
from bt.tasks.base import Context, TaskModel
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM
from bt.tasks.vqa import VQA
from tests.golden_helpers import (
    ANSWERS,
    CONTRASTIVE,
    VOCABULARY,
    WIDTH,
    assert_gradients,
    difference,
    golden_batch,
    golden_tower,
    load_golden,
    table,
    tensors,
)

TOKENIZER = SimpleNamespace(vocab_size=VOCABULARY, mask_id=4, special_ids=[0, 1, 2, 4])
CONTEXT = Context(WIDTH, WIDTH, WIDTH, TOKENIZER, {"answers": [str(i) for i in range(ANSWERS)]})


def golden_model(**objectives) -> TaskModel:
    return load_golden(TaskModel(golden_tower(), objectives)).train()


def make_batch(images, targets, texts="text") -> Batch:
    raw = golden_batch()
    count = len(raw["text_ids"])
    return Batch(
        images=images,
        texts=Texts(raw[f"{texts}_ids"], raw[f"{texts}_masks"].bool()),
        pairs=torch.arange(count)[:, None].expand(count, 2).contiguous(),
        image_ids=torch.arange(len(images)),
        pair_ids=torch.arange(count),
        targets=targets,
    )


def step(model: TaskModel, batch: Batch, name: str):
    """Mean loss of one objective with its gradients, as the released training step has it."""
    result = model(batch)[name]
    loss = result.loss / model.counts(batch)[list(model.objectives).index(name)]
    loss.backward()
    return result, loss.item()


def masked_texts(raw):
    positions = raw["text_labels_mlm"] != -100
    return {
        "ids": raw["text_ids_mlm"],
        "mask": raw["text_masks"].bool(),
        "positions": positions,
        "labels": raw["text_labels_mlm"][positions],
    }


def test_mlm():
    raw, expected = golden_batch(), tensors("bridgetower/mlm/outputs")
    targets = masked_texts(raw)
    positions = targets["positions"]
    model = golden_model(mlm=MLM(CONTEXT))
    result, loss = step(model, make_batch(raw["image"], {"mlm": targets}), "mlm")
    scalars = table("bridgetower/mlm/scalars")
    assert difference(result.outputs["logits"], expected["logits"][positions]) <= 1e-5
    assert loss == pytest.approx(scalars["loss"], abs=2e-6)
    assert result.metrics["accuracy"].mean().item() == pytest.approx(scalars["accuracy"], abs=1e-6)
    assert_gradients(model, "bridgetower/mlm")


def drawn_pairs(raw, expected):
    """Images and targets of the draw that the itm case records."""
    labels = expected["labels"].long()
    own = torch.arange(len(labels))
    pairs = torch.stack([torch.where(labels == 1, own, own + len(own)), own], dim=1)
    return torch.cat([raw["image"], raw["false_image_0"]]), {"pairs": pairs, "labels": labels}


def test_itm():
    raw, expected = golden_batch(), tensors("bridgetower/itm/outputs")
    images, targets = drawn_pairs(raw, expected)
    model = golden_model(itm=ITM(CONTEXT))
    result, loss = step(model, make_batch(images, {"itm": targets}), "itm")
    assert difference(result.outputs["logits"], expected["logits"]) <= 1e-5
    assert loss == pytest.approx(table("bridgetower/itm/scalars")["loss"], abs=2e-6)
    assert_gradients(model, "bridgetower/itm")


def test_one_training_step_of_mlm_and_itm():
    """The released training_step: both losses on the same batch with the same draw, and their sum is descended."""
    raw, scalars = golden_batch(), table("bridgetower/itm/training_step_mlm_itm")
    images, pairs = drawn_pairs(raw, tensors("bridgetower/itm/outputs"))
    batch = make_batch(images, {"mlm": masked_texts(raw), "itm": pairs})
    moved, rate = [], 0.5
    for objectives in ({"mlm": MLM(CONTEXT), "itm": ITM(CONTEXT)}, {"mlm": MLM(CONTEXT)}, {"itm": ITM(CONTEXT)}):
        model = golden_model(**objectives)
        weight = model.tower.text_projection.weight
        before = weight.detach().clone()
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": rate}], lr=rate)
        alone = Parallel(model, World(0, 1, torch.device("cpu")))
        trainer = Trainer(alone, optimizer, lambda _: 1.0, seed=0)
        losses, _ = trainer.train_step([batch])
        assert losses.tolist() == pytest.approx([scalars[f"{name}_loss"] for name in objectives], abs=2e-6)
        moved.append(weight.detach() - before)
    assert scalars["total"] == pytest.approx(scalars["mlm_loss"] + scalars["itm_loss"], abs=1e-6)
    both, *parts = moved
    assert (both - sum(parts)).norm() <= 1e-5 * both.norm() and min(part.norm() for part in parts) > 1e-3


def test_itc():
    raw, expected = golden_batch(), tensors("bridgetower/itc/outputs")
    model = golden_model(itc=ITC(CONTEXT, size=CONTRASTIVE))
    batch = make_batch(raw["image"], {"itc": {"pair": torch.arange(len(raw["image"]))}})
    result, loss = step(model, batch, "itc")
    assert difference(result.outputs["image_to_text"], expected["logits_i2t"]) <= 1e-5
    assert difference(result.outputs["text_to_image"], expected["logits_t2i"]) <= 1e-5
    assert loss == pytest.approx(table("bridgetower/itc/scalars")["loss"], abs=2e-6)
    assert_gradients(model, "bridgetower/itc", least=100)


@pytest.mark.parametrize("side", ["clamp_above", "clamp_below"])
def test_itc_keeps_the_temperature_in_its_range(side):
    raw, scalars = golden_batch(), table("bridgetower/itc/scalars")[side]
    model = golden_model(itc=ITC(CONTEXT, size=CONTRASTIVE))
    with torch.no_grad():
        model.objectives["itc"].temperature.fill_(2.0 if side == "clamp_above" else 1e-6)
    batch = make_batch(raw["image"], {"itc": {"pair": torch.arange(len(raw["image"]))}})
    _, loss = step(model, batch, "itc")
    assert model.objectives["itc"].temperature.item() == pytest.approx(scalars["after"], rel=1e-6)
    assert loss == pytest.approx(scalars["loss"], rel=1e-5)


def test_vqa():
    raw, expected = golden_batch(), tensors("bridgetower/vqa/outputs")
    model = golden_model(vqa=VQA(CONTEXT, hidden_scale=2))
    targets = {"scores": expected["targets"], "answered": torch.ones(len(raw["image"]), dtype=torch.bool)}
    batch = make_batch(raw["image"], {"vqa": targets})
    result, loss = step(model, batch, "vqa")
    scalars = table("bridgetower/vqa/scalars")
    assert difference(result.outputs["logits"], expected["logits"]) <= 1e-5
    assert loss == pytest.approx(scalars["loss"], rel=2e-6)
    batch.entries = [{}] * len(raw["image"])
    score = model.eval()(batch)["vqa"].metrics["score"]
    assert score.mean().item() == pytest.approx(scalars["score"], abs=1e-6)
    assert_gradients(model, "bridgetower/vqa")
