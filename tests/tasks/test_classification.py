"""SNLI-VE, NLVR2, CIFAR and GLUE: against the released code, transformers and formulas written out pair by pair."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from bt.config import OptimizerConfig
from bt.data.batch import Batch, Texts
from bt.engine.optimizer import build_optimizer
from bt.errors import ConfigError, DataError
from bt.models.bridgetower import Need
from bt.tasks.base import TaskModel
from bt.tasks.cifar import CIFAR
from bt.tasks.classifier import NO_LABEL, ClassTargets
from bt.tasks.glue import GLUE
from bt.tasks.nlvr2 import NLVR2
from bt.tasks.snli_ve import SNLIVE
from tests.golden_helpers import assert_gradients, difference, golden_batch, golden_state, golden_tower, table, tensors
from tests.models.towers import TEXT, gradients, make_images, make_texts, make_tower
from tests.tasks.helpers import CONTEXT, make_batch, make_draft
from tests.tasks.test_golden import CONTEXT as GOLDEN_CONTEXT
from tests.tasks.test_golden import make_batch as golden_pairs
from tests.tasks.test_golden import step

GLUE_CLASSES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "stsb": [],
}


def context(*classes: str, base=CONTEXT):
    return dataclasses.replace(base, labels={"classes": list(classes)} if classes else {})


THREE, TWO = context("contradiction", "neutral", "entailment"), context("False", "True")


def double_model(objective, **options) -> TaskModel:
    """One objective, called "task", on the small tower; all parameters random, in double precision."""
    torch.manual_seed(1)
    model = TaskModel(make_tower(**options), {"task": objective}).double()
    with torch.no_grad():
        for parameter in model.objectives.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def log_softmax(logits: Tensor, label: int) -> Tensor:
    return (logits[label].exp() / logits.exp().sum()).log()


def literal_head(head: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, LayerNorm, GELU, Linear of one vector, from their definitions."""
    first, norm, _, last = head
    h = first.weight @ x + first.bias
    h = (h - h.mean()) / (((h - h.mean()) ** 2).mean() + norm.eps).sqrt() * norm.weight + norm.bias
    return last.weight @ (h / 2 * (1 + (h / math.sqrt(2)).erf())) + last.bias


def assert_equal_losses(model: TaskModel, batch: Batch, literal: Tensor, least: int) -> None:
    """The objective's loss and all gradients against those of `literal`, which is made of the same parameters."""
    result = model(batch)["task"]
    assert result.loss.item() == pytest.approx(literal.item(), rel=1e-6)
    found = {}
    for name, loss in (("own", result.loss), ("literal", literal)):
        model.zero_grad()
        loss.backward()
        found[name] = gradients(model)
    assert found["own"].keys() == found["literal"].keys() and len(found["own"]) >= least
    largest = max(gradient.norm() for gradient in found["literal"].values())
    for name, gradient in found["literal"].items():
        # Logits turn to single precision before the loss; and the bias of attention keys has no gradient but rounding.
        assert (gradient - found["own"][name]).norm() <= 2e-6 * gradient.norm() + 1e-8 * largest, name


def cls_of(model: TaskModel, image: Tensor, texts: Texts, row: int, type_id: int = 1) -> Tensor:
    """(2 * width,) of one image and one text without its padding, encoded for them alone."""
    tower, tokens = model.tower, int(texts.mask[row].sum())
    text = tower.encode_texts(Texts(texts.ids[row : row + 1, :tokens], texts.mask[row : row + 1, :tokens]))
    pair = torch.zeros(1, 2, dtype=torch.long)
    return tower.fuse(tower.encode_images(image[None], type_id), text, pair, Need(cls=True)).cls[0]


# Against the released code


def test_snli_ve_is_the_released_code():
    raw, expected = golden_batch(), tensors("bridgetower/snli/outputs")
    objective = SNLIVE(context("contradiction", "neutral", "entailment", base=GOLDEN_CONTEXT), hidden_scale=2)
    model = TaskModel(golden_tower(), {"snli_ve": objective}).train()
    state = golden_state()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    batch = golden_pairs(raw["image"], {"snli_ve": {"labels": raw["snli_labels"]}})
    result, loss = step(model, batch, "snli_ve")
    scalars = table("bridgetower/snli/scalars")
    assert difference(result.outputs["logits"], expected["logits"]) <= 1e-5
    assert loss == pytest.approx(scalars["loss"], abs=2e-6)
    assert_gradients(model, "bridgetower/snli")
    accuracy = model.eval()(batch)["snli_ve"].metrics["accuracy"]
    assert accuracy.mean().item() == scalars["accuracy"] and len(accuracy) == 4


def golden_nlvr2() -> TaskModel:
    """Two type rows as in the fixtures' weights; NLVR2's table is set by the test."""
    model = TaskModel(
        golden_tower(), {"nlvr2": NLVR2(context("False", "True", base=GOLDEN_CONTEXT), dropout=0)}
    ).train()
    model.tower.type_embeddings = nn.Embedding(NLVR2.token_types, model.tower.width)
    state = golden_state()
    adapted = model.tower.adapt_state(
        {key.removeprefix("tower."): tensor for key, tensor in state.items() if key.startswith("tower.")}
    )
    state |= {f"tower.{key}": tensor for key, tensor in adapted.items()}
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model


def test_nlvr2_is_the_released_code():
    """The released code runs the model twice; here both images of a statement are rows of one batch."""
    raw, expected = golden_batch(), tensors("bridgetower/nlvr2/outputs")
    model = golden_nlvr2()
    types = tensors("bridgetower/nlvr2/type_table_from_checkpoint")
    assert torch.equal(model.tower.type_embeddings.weight, types["model"])
    with torch.no_grad():
        model.tower.type_embeddings.weight.copy_(
            tensors("bridgetower/nlvr2/type_table")["token_type_embeddings.weight"]
        )
    batch = golden_pairs(torch.cat([raw["image"], raw["image_1"]]), {"nlvr2": {"labels": raw["nlvr2_labels"]}})
    batch.second_images = torch.arange(4, 8)
    seen = []
    model.objectives["nlvr2"].head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    result, loss = step(model, batch, "nlvr2")
    scalars = table("bridgetower/nlvr2/scalars")
    assert difference(seen[0], torch.cat([expected["cls_feats_1"], expected["cls_feats_2"]], 1)) <= 1e-5
    assert difference(result.outputs["logits"], expected["logits"]) <= 1e-5
    assert loss == pytest.approx(scalars["loss"], abs=2e-6)
    assert_gradients(model, "bridgetower/nlvr2")
    assert model.eval()(batch)["nlvr2"].metrics["accuracy"].mean().item() == scalars["accuracy"]


# Against formulas, pair by pair

LABELS = torch.tensor([2, 0, NO_LABEL, 1, 1])


@pytest.mark.parametrize("hidden_scale", [2, 1.5])
def test_snli_ve_pair_by_pair(hidden_scale):
    model = double_model(SNLIVE(THREE, hidden_scale=hidden_scale))
    head, images, texts = model.objectives["task"].head, make_images(2).double(), make_texts(4)
    assert head[0].weight.shape == (32 * hidden_scale, 32)
    pairs = [[0, 1], [1, 0], [1, 2], [0, 3], [1, 3]]
    batch = make_batch(texts, pairs, {"task": {"labels": LABELS}}, images=images)
    terms = [
        -log_softmax(literal_head(head, cls_of(model, images[image], texts, text)), label)
        for (image, text), label in zip(pairs, LABELS.tolist(), strict=True)
        if label != NO_LABEL
    ]
    assert_equal_losses(model, batch, sum(terms), least=80)
    assert model.counts(batch).item() == len(terms) == 4


@pytest.mark.parametrize(
    ("first", "second", "encoded"),
    [([0, 2, 2, 4, 0], [1, 3, 3, 5, 1], 6), ([0, 1, 2, 0, 1], [1, 2, 0, 2, 1], 3)],
    ids=["apart", "an image in both places"],
)
def test_nlvr2_pair_by_pair(first, second, encoded):
    """As the official code: the whole model for the first images, again for the second ones, statement by statement."""
    model = double_model(NLVR2(TWO, dropout=0), token_types=3)
    head, images, texts = model.objectives["task"].head, make_images(encoded).double(), make_texts(4)
    assert head[0].weight.shape == (48, 64)
    text_rows, labels = [1, 0, 3, 2, 3], [1, 0, NO_LABEL, 1, 0]
    targets = {"task": {"labels": torch.tensor(labels)}}
    batch = make_batch(texts, list(zip(first, text_rows, strict=True)), targets, images=images)
    batch.second_images = torch.tensor(second)
    passes = []
    for encoder in (model.tower.vision, model.tower.text):
        encoder.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    model(batch)
    assert passes == [encoded, 4], "every image and statement passes its encoder once"
    terms = []
    for left, right, text, label in zip(first, second, text_rows, labels, strict=True):
        both = [cls_of(model, images[image], texts, text, kind) for image, kind in ((left, 1), (right, 2))]
        if label != NO_LABEL:
            terms.append(-log_softmax(literal_head(head, torch.cat(both)), label))
    assert_equal_losses(model, batch, sum(terms), least=80)
    swapped = dataclasses.replace(batch, second_images=batch.pairs[:, 0])
    swapped.pairs = torch.stack([batch.second_images, batch.pairs[:, 1]], 1)
    assert difference(model(swapped)["task"].outputs["logits"], model(batch)["task"].outputs["logits"]) > 1e-3


def test_nlvr2_drops_its_features_before_the_head():
    model = double_model(NLVR2(TWO, dropout=0.25), token_types=3)
    batch = make_batch(
        make_texts(2), [[0, 0], [2, 1]], {"task": {"labels": torch.tensor([0, 1])}}, images=make_images(4)
    )
    batch = dataclasses.replace(batch, images=batch.images.double(), second_images=torch.tensor([1, 3]))
    seen = []
    model.objectives["task"].head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model.eval()(batch)
    model.train()(batch)
    whole, dropped = seen
    assert whole.shape == (2, 64) and 10 < (dropped == 0).sum() < 60
    assert difference(dropped, torch.where(dropped == 0, 0.0, whole / 0.75)) < 1e-12
    assert not any(isinstance(module, nn.Dropout) for module in NLVR2(TWO, dropout=0).modules())


def literal_vision(vision: nn.Module, image: Tensor) -> Tensor:
    """The [CLS] after ln_post, (width,), of a pre-norm transformer with QuickGELU written out."""
    visual = vision.visual
    width, size = visual.conv1.weight.shape[0], visual.conv1.kernel_size[0]
    patches = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    x = torch.cat([visual.class_embedding[None], patches @ visual.conv1.weight.reshape(width, -1).T])
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.transformer.resblocks:
        heads = block.attn.num_heads
        q, k, v = (block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=1)
        q, k, v = (part.reshape(len(x), heads, -1).transpose(0, 1) for part in (q, k, v))
        share = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + block.attn.out_proj((share @ v).transpose(0, 1).reshape(len(x), -1))
        h = block.mlp[0](block.ln_2(x))
        x = x + block.mlp[-1](h * (1.702 * h).sigmoid())
    return visual.ln_post(x)[0]


def image_batch(labels: list[int], count: int | None = None) -> Batch:
    count = len(labels) if count is None else count
    pairs = torch.stack([torch.arange(count), torch.full((count,), -1)], 1)
    texts = Texts(torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0, dtype=torch.bool))
    targets = {"task": {"labels": torch.tensor(labels)}}
    entries = [{} if label == NO_LABEL else {"label": label} for label in labels]
    return make_batch(texts, pairs, targets, images=make_images(count).double(), entries=entries)


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_cifar_image_by_image(head):
    model = double_model(CIFAR(context(*"abcde"), head=head))
    own, batch = model.objectives["task"].head, image_batch([4, 0, NO_LABEL, 2])
    terms = [
        -log_softmax(own.weight @ literal_vision(model.tower.vision, image) + own.bias, label)
        for image, label in zip(batch.images, [4, 0, None, 2], strict=True)
        if label is not None
    ]
    assert_equal_losses(model, batch, sum(terms), least=40)
    assert model.counts(batch).item() == 3
    named = [name for group in build_optimizer(model, OptimizerConfig()).param_groups for name in group["param_names"]]
    assert {name.split(".")[1] for name in named if name.startswith("tower.")} == {"vision"}
    heads = {name for name in named if not name.startswith("tower.")}
    assert heads == ({"objectives.task.head.weight", "objectives.task.head.bias"} if head == "trained" else set())
    assert set(gradients(model)) == set(named)


def test_a_new_cifar_head():
    head = CIFAR(dataclasses.replace(context(*map(str, range(100))), image_width=256)).head
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.03) and not head.bias.any()


# GLUE against transformers


def glue_batch(labels: list, dtype=torch.long) -> Batch:
    """Four texts without images, of six pairs."""
    rows = [2, 0, 1, 3, 3, 1][: len(labels)]
    pairs = torch.stack([torch.full((len(rows),), -1), torch.tensor(rows)], 1)
    targets = {"task": {"labels": torch.tensor(labels, dtype=dtype)}}
    return make_batch(make_texts(4), pairs, targets, images=torch.empty(0, 3, 24, 24, dtype=torch.uint8))


def transformers_model(model: TaskModel, outputs: int, dropout: float) -> RobertaForSequenceClassification:
    sizes = {key: value for key, value in TEXT.items() if key != "model_type"}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    theirs = RobertaForSequenceClassification(RobertaConfig(**sizes, **rates, num_labels=outputs)).double().train()
    theirs.roberta.load_state_dict(model.tower.text.model.state_dict())
    theirs.classifier.load_state_dict(model.objectives["task"].head.state_dict())
    return theirs


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("task", "outputs"), [("sst2", 2), ("mnli", 3), ("stsb", 1)])
def test_glue_is_transformers_sequence_classification(task, outputs, dropout):
    """Loss, logits and gradients; with dropout both draw the same masks from the same seed."""
    classes = GLUE_CLASSES[task]
    model = double_model(GLUE(context(*classes), task, dropout=dropout), dropout=dropout)
    labels = [0, outputs - 1, 1, 0, 1, 0] if classes else [4.2, 0.0, 5.0, 3.25, 1.0, 2.5]
    batch = glue_batch(labels, torch.long if classes else torch.double)
    theirs = transformers_model(model, outputs, dropout)
    # Texts one by one as transformers has them; with dropout in the rows of the unique ones, for equal masks.
    rows = batch.pairs[:, 1] if dropout == 0 else torch.arange(4)
    if dropout:
        batch = dataclasses.replace(batch, pairs=torch.stack([torch.full((4,), -1), rows], 1))
        batch.targets = {"task": {"labels": batch.targets["task"]["labels"][:4]}}
    torch.manual_seed(5)
    result = model(batch)["task"]
    torch.manual_seed(5)
    labels = batch.targets["task"]["labels"]
    found = theirs(input_ids=batch.texts.ids[rows], attention_mask=batch.texts.mask[rows].long(), labels=labels)
    logits = result.outputs["logits"] if classes else result.outputs["scores"][:, None]
    assert difference(logits, found.logits.float()) < 1e-6
    assert result.loss.item() / len(labels) == pytest.approx(found.loss.item(), rel=1e-6)
    assert model.counts(batch).item() == len(labels)
    (result.loss / len(labels)).backward()
    found.loss.backward()
    expected = {
        f"tower.text.model.{name}": p.grad for name, p in theirs.roberta.named_parameters() if p.grad is not None
    }
    expected |= {f"objectives.task.head.{name}": p.grad for name, p in theirs.classifier.named_parameters()}
    own = gradients(model)
    assert own.keys() == expected.keys() and len(own) == 5 + 16 * 3 + 4
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradient - own[name]).norm() <= 2e-6 * gradient.norm() + 1e-8 * largest, name


def test_stsb_leaves_out_what_has_no_score():
    model = double_model(GLUE(context(), "stsb", dropout=0))
    whole, part = glue_batch([4.0, 1.0, 2.0], torch.double), glue_batch([4.0, math.nan, 2.0], torch.double)
    results = [model(batch)["task"] for batch in (whole, part)]
    scores = results[0].outputs["scores"].tolist()
    assert results[0].loss.item() == pytest.approx(sum((s - y) ** 2 for s, y in zip(scores, (4, 1, 2), strict=True)))
    assert (results[0].loss - results[1].loss).item() == pytest.approx((scores[1] - 1) ** 2, rel=1e-5)
    assert model.counts(part).item() == 2
    results[1].loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# Optimizer groups of the official uni-modal recipes


@pytest.mark.parametrize(
    "objective", [CIFAR(context(*"abcde")), GLUE(context(*GLUE_CLASSES["cola"]), "cola")], ids=["cifar", "glue"]
)
def test_the_uni_modal_recipes_groups(objective):
    """One rate for all, and no decay of biases and LayerNorm.weight alone, by name as run_cifar.py and run_glue.py."""
    model = double_model(objective)
    cfg = OptimizerConfig(lr=2e-5, weight_decay=0.1, groups="official", head_multiplier=1, cross_multiplier=1)
    groups = build_optimizer(model, cfg).param_groups
    assert {group["lr"] for group in groups} == {2e-5}
    decayed = {name: group["weight_decay"] > 0 for group in groups for name in group["param_names"]}
    assert decayed == {name: not re.search(r"bias|LayerNorm\.weight", name) for name in decayed}
    assert set(decayed.values()) == {True, False} and len(decayed) > 40


# Targets, predictions and mistakes


def test_labels_outside_the_classes_are_refused():
    targets = ClassTargets("snli_ve", ["no", "maybe", "yes", "never"])
    draft = make_draft([0, 1, 0], entries=[{"id": "a", "label": 3}, {"id": "b"}, {"id": "c", "label": None}])
    assert targets(draft)["labels"].tolist() == [3, NO_LABEL, NO_LABEL]
    for label in (4, -1, "yes", 1.0, True):
        with pytest.raises(DataError) as error:
            targets(make_draft([0, 1], entries=[{"id": "a", "label": 0}, {"id": "b", "label": label}]))
        assert str(error.value) == (
            f"task snli_ve: label {label!r} of entry b is not the number of a class: allowed are 0 to 3 (no, maybe, "
            "yes, ...)"
        )
    with pytest.raises(DataError, match="label 9 of entry number 1 is not"):  # CIFAR's entries have no id
        targets(make_draft([0, 1], entries=[{"label": 0}, {"label": 9}]))
    stsb = GLUE(context(), "stsb").targets
    assert stsb(make_draft([0], entries=[{"label": 3.5}]))["labels"].tolist() == [3.5]
    assert stsb(make_draft([0], entries=[{}]))["labels"].isnan().all()
    with pytest.raises(DataError, match="label '3.5' of entry x is not a score"):
        stsb(make_draft([0], entries=[{"id": "x", "label": "3.5"}]))


def test_data_that_does_not_fit_the_task():
    with pytest.raises(DataError, match="task nlvr2: the index of data.dir has no label map 'classes'"):
        NLVR2(context())
    with pytest.raises(
        DataError, match="the classes of mrpc are not_equivalent, equivalent; those of data.dir are False"
    ):
        GLUE(TWO, "mrpc")
    with pytest.raises(DataError, match="the classes of stsb are none, but scores; those of data.dir are False, True"):
        GLUE(TWO, "stsb")
    with pytest.raises(ConfigError, match="GLUE.task=wnli: allowed are cola, sst2"):
        GLUE(TWO, "wnli")
    with pytest.raises(ConfigError, match="CIFAR.head=fixed: allowed are trained, frozen"):
        CIFAR(TWO, head="fixed")
    batch = make_batch(make_texts(1), [[0, 0]], {"task": {"labels": torch.tensor([0])}}, images=make_images(1).double())
    with pytest.raises(DataError, match="no second image; convert an NLVR2 source"):
        double_model(NLVR2(TWO), token_types=3)(batch)
    with pytest.raises(DataError, match="task cifar: the samples of data.dir have no images"):
        double_model(CIFAR(TWO))(image_batch([0], count=0))


def test_predictions_and_accuracy_with_and_without_labels():
    model = double_model(SNLIVE(THREE)).eval()
    with torch.no_grad():
        model.objectives["task"].head[-1].weight.zero_()
        model.objectives["task"].head[-1].bias.copy_(torch.tensor([0.0, 0.0, math.log(2)]))
    entries = [
        {"id": "p0", "text": "a dog", "label": 2},
        {"id": "p1", "text": "a cat"},
        {"id": 7, "text": "", "label": 0},
    ]
    draft = make_draft([0, 1, 1], make_texts(3), entries=entries)
    batch = make_batch(draft.texts, draft.pairs, {"task": model.objectives["task"].targets(draft)}, entries=entries)
    batch.images = batch.images.double()
    result = model(batch)["task"]
    assert result.metrics["accuracy"].tolist() == [1, 0]
    assert result.loss.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-6)
    shared = {"prediction": "entailment", "probability": 0.5}
    assert model.objectives["task"].predictions(batch, result) == [
        {"id": "p0", "text": "a dog", "image": "image-0", **shared, "truth": "entailment"},
        {"id": "p1", "text": "a cat", "image": "image-1", **shared, "truth": None},
        {"id": 7, "text": "", "image": "image-1", **shared, "truth": "contradiction"},
    ]
    for entry in entries:
        entry.pop("label", None)
    batch.targets = {"task": model.objectives["task"].targets(draft)}
    result = model(batch)["task"]
    assert model.counts(batch).item() == 0 and result.loss.item() == 0
    assert result.metrics["accuracy"].numel() == 0
    assert len(model.objectives["task"].predictions(batch, result)) == 3
