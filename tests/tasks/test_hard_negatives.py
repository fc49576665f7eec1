"""What hard negatives are drawn from, and what a pair without any does."""

import math

import numpy as np
import pytest
import torch

from bt.data.batch import Texts
from bt.errors import ConfigError
from bt.models.bridgetower import Need
from bt.tasks.base import TaskModel
from bt.tasks.irtr import IRTR, one_of_many
from bt.tasks.itc import ITC
from bt.tasks.itm_itc import HardITM, draw_columns, hard_targets, negative_weights
from tests.models.towers import gradients, make_texts, make_tower
from tests.tasks.helpers import CONTEXT, make_batch, make_draft


def make_model(positives: str = "image") -> TaskModel:
    # The order of the objectives does not matter: itm asks for itc's result.
    torch.manual_seed(0)
    itc = ITC(CONTEXT, size=8, temperature=0.4, positives=positives)
    return TaskModel(make_tower(), {"itm": HardITM(CONTEXT), "itc": itc}).train()


def targets_of(texts: Texts, image_rows: list[int], text_rows: list[int], seed: int = 0) -> dict:
    draft = make_draft(image_rows, texts, text_rows=text_rows, seed=seed)
    return {"itm": hard_targets(draft), "itc": {"pair": torch.arange(len(image_rows))}}


def test_columns_are_drawn_in_proportion():
    weights = negative_weights(
        torch.tensor([[0.0, math.log(3.0), 50.0, -math.inf]]), torch.tensor([[False, False, True, False]])
    )
    assert weights.tolist() == [[pytest.approx(0.25), pytest.approx(0.75), 0, 0]]
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    columns = draw_columns(weights.expand(1000, -1), uniform)
    assert columns.bincount(minlength=4).tolist() == [250, 750, 0, 0]
    edges = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64)
    assert draw_columns(weights.expand(4, -1), edges).tolist() == [0, 0, 1, 1]
    none = negative_weights(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert none.tolist() == [[0, 0, 0]] and draw_columns(none, edges[:1]).shape == (1,)


def test_negatives_are_never_of_the_same_image_or_of_its_words():
    """Images 0 and 1 both have text 0, in pairs 0 and 3: neither text 1 nor image 0 is a negative of the other's."""
    images, texts = [0, 0, 1, 1, 2], [0, 1, 2, 0, 3]
    model, unique = make_model(), make_texts(4)
    seen_images, seen_texts = [set() for _ in images], [set() for _ in images]
    for seed in range(60):
        batch = make_batch(unique, list(zip(images, texts, strict=True)), targets_of(unique, images, texts, seed))
        with torch.no_grad():
            found = model(batch)["itm"].outputs
        for pair, (image, text) in enumerate(zip(found["images"].tolist(), found["texts"].tolist(), strict=True)):
            seen_images[pair].add(image)
            seen_texts[pair].add(text)
    # Columns: pair 0's text is of images 0 and 1; the texts of image 0 are 0 (also in pair 3) and 1.
    assert seen_images == [{4}, {2, 3, 4}, {0, 1, 4}, {4}, {0, 1, 2, 3}]
    assert seen_texts == [{2, 4}, {2, 4}, {1, 4}, {1, 4}, {0, 1, 2, 3}]


def test_the_loss_written_out():
    images, texts, unique = [0, 1, 2], [2, 0, 1], make_texts(3)
    model = make_model()
    batch = make_batch(unique, list(zip(images, texts, strict=True)), targets_of(unique, images, texts))
    results = model(batch)
    found = results["itm"].outputs
    both = results["itc"].outputs
    for weights, logits in (("image_weights", both["text_to_image"]), ("text_weights", both["image_to_text"])):
        shares = [[math.exp(x) * (i != j) for j, x in enumerate(row)] for i, row in enumerate(logits.tolist())]
        expected = [[x / sum(row) for x in row] for row in shares]
        torch.testing.assert_close(found[weights].float(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    shown = [(images[i], texts[i], 1) for i in range(3)]
    shown += [(images[found["images"][i]], texts[i], 0) for i in range(3)]
    shown += [(images[i], texts[found["texts"][i]], 0) for i in range(3)]
    total = 0.0
    for image, text, label in shown:
        one = Texts(unique.ids[text][None], unique.mask[text][None])
        encoded = model.tower.encode_images(batch.images[image][None]), model.tower.encode_texts(one)
        cls = model.tower.fuse(*encoded, torch.zeros(1, 2, dtype=torch.long), Need(cls=True)).cls
        total -= model.objectives["itm"].head(cls).log_softmax(-1)[0, label].item()
    assert results["itm"].loss.item() == pytest.approx(total, rel=1e-5)
    assert dict(zip(model.objectives, model.counts(batch).tolist(), strict=True)) == {"itm": 9, "itc": 3}
    results["itm"].loss.backward()
    assert "tower.text_projection.weight" in gradients(model)
    assert not any(key.startswith("objectives.itc") for key in gradients(model)), "choosing passes no gradient"


def test_a_single_image_has_positives_alone():
    model, unique = make_model(), make_texts(2)
    batch = make_batch(unique, [[0, 0], [0, 1]], targets_of(unique, [0, 0], [0, 1]))
    result = model(batch)["itm"]
    expected = -result.outputs["logits"][:2].log_softmax(-1)[:, 1].sum()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    values, weights = result.metrics["accuracy"]
    assert weights.tolist() == [1, 1, 0, 0, 0, 0] and len(values) == 6
    assert model.counts(batch).tolist() == [6, 2]


@pytest.mark.parametrize("positives", ["image", "pair"])
def test_itc_takes_no_text_of_the_image_for_a_negative(positives):
    """Pairs 0 and 2 are of one image: its other text is a target, too, or is left out."""
    model, unique = make_model(positives), make_texts(3)
    batch = make_batch(unique, [[0, 2], [1, 0], [0, 1]], targets_of(unique, [0, 1, 0], [2, 0, 1]))
    result = model(batch)["itc"]
    total = 0.0
    for logits in (result.outputs["image_to_text"], result.outputs["text_to_image"]):
        for i, row in enumerate(logits.tolist()):
            same = [0, 2] if i != 1 else [1]
            own, rivals = (same, range(3)) if positives == "image" else ([i], {i, *range(3)} - ({*same} - {i}))
            total -= sum(row[j] for j in own) / len(own) - math.log(sum(math.exp(row[j]) for j in rivals))
    assert result.loss.item() == pytest.approx(total / 2, rel=1e-5)


def test_draws_are_the_pairs_own():
    unique = make_texts(4)
    whole = hard_targets(make_draft([0, 1, 2, 3], unique))
    part = make_draft([0, 1, 2, 3], unique)
    uniform = part.uniform
    part.pairs, part.uniform = part.pairs[2:], lambda purpose, n: uniform(purpose, n)[2:]
    for name, values in hard_targets(part).items():
        assert torch.equal(values, whole[name][2:]), name
    assert whole["image_draw"].dtype == torch.float64 and not torch.equal(whole["image_draw"], whole["text_draw"])


def test_equal_texts_have_equal_keys():
    ids = torch.tensor([[0, 9, 2, 1], [0, 9, 2, 1], [0, 9, 2, 2], [0, 8, 2, 1]])
    keys = hard_targets(make_draft([0, 1, 2, 3], Texts(ids, ids != 1)))["text_key"].tolist()
    assert keys[0] == keys[1] and len(set(keys)) == 3
    longer = torch.cat([ids, torch.ones(4, 2, dtype=torch.long)], dim=1)
    assert hard_targets(make_draft([0, 1, 2, 3], Texts(longer, longer != 1)))["text_key"].tolist() == keys


def test_what_does_not_go_is_said_when_the_task_is_built():
    with pytest.raises(ConfigError, match="HardITM.contrast=itc: the task has no such objective, it has itm"):
        TaskModel(make_tower(), {"itm": HardITM(CONTEXT)})
    with pytest.raises(ConfigError, match="HardITM.negatives=all: allowed are local, global"):
        HardITM(CONTEXT, negatives="all")
    with pytest.raises(ConfigError, match="IRTR.false_texts=any: allowed are other, official"):
        IRTR(CONTEXT, false_texts="any")
    with pytest.raises(ConfigError, match="ITC.positives=all: allowed are image, pair"):
        ITC(CONTEXT, positives="all")


def test_the_rank_head_starts_as_the_match_row_of_a_head_that_fits():
    irtr, width = IRTR(CONTEXT), 2 * CONTEXT.width
    itm = {"head.fc.weight": torch.randn(2, width), "head.fc.bias": torch.randn(2)}
    other, tensors = irtr.start_from({"itm": itm, "mlm": {}})
    assert other == "itm"
    assert torch.equal(tensors["head.weight"], itm["head.fc.weight"][1:])
    assert torch.equal(tensors["head.bias"], itm["head.fc.bias"][1:])
    assert irtr.start_from({"mlm": {}}) is None
    assert irtr.start_from({"itm": {"head.fc.weight": torch.randn(2, 3), "head.fc.bias": torch.randn(2)}}) is None
    cls = torch.randn(5, width)
    irtr.load_state_dict(tensors)
    expected = cls @ itm["head.fc.weight"][1] + itm["head.fc.bias"][1]
    torch.testing.assert_close(irtr.score(cls), expected)


def test_one_of_many():
    draft = make_draft([0, 0, 1], make_texts(9), text_rows=[2, 0, 1])
    draft.false_text_rows = np.array([[4, 5], [6, 7], [8, 4]])
    assert one_of_many(draft)["texts"].tolist() == [[2, 4, 5], [0, 6, 7], [1, 8, 4]]
    model = TaskModel(make_tower(), {"irtr": IRTR(CONTEXT, texts=2)}).train()
    batch = make_batch(draft.texts, draft.pairs, {"irtr": one_of_many(draft)})
    result = model(batch)["irtr"]
    scores = result.outputs["scores"].tolist()
    expected = -sum(row[0] - math.log(sum(map(math.exp, row))) for row in scores)
    assert result.loss.item() == pytest.approx(expected, rel=1e-5) and model.counts(batch).tolist() == [3]
    assert result.metrics["accuracy"].tolist() == [float(row[0] > max(row[1:])) for row in scores]
    equal = one_of_many(draft)["texts"]
    equal[:] = equal[:, :1]
    batch.targets["irtr"]["texts"] = equal
    assert model(batch)["irtr"].metrics["accuracy"].tolist() == [0, 0, 0], "an equal score is no hit"
