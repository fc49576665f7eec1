"""What the objectives draw and count: targets from drafts, losses and metrics from batches made by hand."""

import math

import numpy as np
import pytest
import torch

from bt.data.batch import Texts
from bt.data.collate import BatchMaker
from bt.data.plan import Cut, PairIndex
from bt.data.shards import ShardSet
from bt.data.text import train_tokenizer
from bt.data.transforms import make_transform
from bt.errors import ConfigError, DataError
from bt.tasks.base import Result, TaskModel
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM, ITMTargets
from bt.tasks.mlm import MLM, MLMTargets
from bt.tasks.vqa import VQA, VQATargets
from tests.models.towers import gradients, make_texts, make_tower
from tests.tasks.helpers import ANSWERS, CONTEXT, make_batch, make_draft

VOCABULARY = 500


def long_texts(count: int, tokens: int = 30) -> Texts:
    """Start token, words, end token, padding; lengths differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (count, tokens), generator=generator)
    lengths = tokens - torch.arange(count)[:, None] % 7
    ids[:, 0] = 0
    ids.scatter_(1, lengths - 1, 2)
    mask = torch.arange(tokens) < lengths
    return Texts(ids.masked_fill(~mask, 1), mask)


def test_mlm_draws_the_papers_shares():
    texts = long_texts(1000)
    text_rows = np.random.default_rng(0).integers(0, 1000, 4000).tolist()
    targets = MLMTargets(0.15, VOCABULARY, 4, (0, 1, 2, 3, 4))(make_draft([0] * 4000, texts, text_rows=text_rows))
    original, mask = texts.ids[text_rows], texts.mask[text_rows]
    positions, ids = targets["positions"], targets["ids"]
    assert torch.equal(targets["mask"], mask)
    words = mask & (original >= 5)
    assert not (positions & ~words).any(), "neither special tokens nor padding are chosen"
    assert positions.sum().item() / words.sum().item() == pytest.approx(0.15, abs=0.004)
    assert torch.equal(targets["labels"], original[positions])
    assert torch.equal(ids[~positions], original[~positions])
    chosen, before = ids[positions], original[positions]
    masked, kept = (chosen == 4).float().mean().item(), (chosen == before).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.012) and kept == pytest.approx(0.1, abs=0.01)
    random = chosen[(chosen != 4) & (chosen != before)]
    assert len(random) / len(chosen) == pytest.approx(0.1, abs=0.01)
    assert len(random.unique()) > 0.9 * VOCABULARY and random.min() < 5, "random ids are of the whole vocabulary"
    same = [row for row in range(1, 4000) if text_rows[row] == text_rows[0]]
    assert any(not torch.equal(positions[0], positions[row]) for row in same), "each pair of a text has its own draw"


@pytest.mark.parametrize(
    "objective, options, message",
    [
        (MLM, {"probability": 0.0}, "MLM.probability=0.0: must be above 0 and at most 1"),
        (MLM, {"probability": 15}, "MLM.probability=15: must be above 0 and at most 1"),
        (VQA, {"weight": -1.0}, "VQA.weight=-1.0: must be at least 0"),
        (ITC, {"temperature": 0.0}, "ITC.temperature=0.0: must be above 0"),
        (ITM, {"negatives": "hard"}, "ITM.negatives=hard: allowed are batch, sampled"),
    ],
)
def test_values_out_of_range(objective, options, message):
    with pytest.raises(ConfigError, match=message):
        objective(CONTEXT, **options)


def test_a_batch_with_nothing_masked_has_no_loss():
    texts = make_texts(2)
    targets = MLMTargets(1e-9, 50, 4, (0, 1, 2, 3, 4))(make_draft([0, 1], texts))
    assert targets["labels"].numel() == 0 and torch.equal(targets["ids"], texts.ids)
    model = TaskModel(make_tower(), {"mlm": MLM(CONTEXT)}).train()
    batch = make_batch(texts, [[0, 0], [1, 1]], {"mlm": targets})
    result = model(batch)["mlm"]
    assert result.loss.item() == 0 and model.counts(batch).tolist() == [0]
    result.loss.backward()
    found = gradients(model)
    assert "objectives.mlm.head.decoder.weight" in found
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in found.values())


def test_itm_batch_negatives_are_other_images_of_the_batch():
    own = np.repeat([4, 1, 7, 2], 500).tolist()
    match = (np.arange(2000) % 2 == 0).tolist()
    targets = ITMTargets("batch")(make_draft(own, match=match))
    pairs = targets["pairs"].numpy()
    assert targets["labels"].tolist() == [int(kept) for kept in match]
    assert np.array_equal(pairs[:, 1], np.arange(2000))
    assert np.array_equal(pairs[match, 0], np.array(own)[match])
    false = ~np.array(match)
    assert (pairs[false, 0] != np.array(own)[false]).all()
    # Each of the three others about as often; rows without a pair never.
    rows, counts = np.unique(pairs[false & (np.array(own) == 7), 0], return_counts=True)
    assert rows.tolist() == [1, 2, 4] and counts.min() > 60


def test_itm_of_a_single_image_stays_a_match():
    targets = ITMTargets("batch")(make_draft([0, 0, 0], match=[True, False, False]))
    assert targets["labels"].tolist() == [1, 1, 1] and targets["pairs"].tolist() == [[0, 0], [0, 1], [0, 2]]


def test_itm_sampled_negatives_are_the_drawn_images():
    draft = make_draft([0, 1, 1, 0], match=[False, True, False, False], false_image_rows=[2, -1, 0, -1])
    targets = ITMTargets("sampled")(draft)
    assert targets["pairs"].tolist() == [[2, 0], [1, 1], [0, 2], [0, 3]]
    # The last pair was given no other image, so it is a match whatever the draw was.
    assert targets["labels"].tolist() == [0, 1, 0, 1]
    # A row that holds the own image once more would be no negative.
    draft = make_draft([0, 1], match=[False, False], false_image_rows=[2, 0])
    draft.image_ids = np.array([9, 8, 9])
    assert ITMTargets("sampled")(draft)["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("negatives", ["batch", "sampled"])
def test_itm_on_real_batches(few_dir, negatives):
    shards = ShardSet(few_dir, "train")
    objective = ITM(CONTEXT, negatives=negatives)
    index = PairIndex(shards.counts("captions"))
    maker = BatchMaker(
        shards,
        index,
        text_field="captions",
        tokenizer=train_tokenizer(shards.all_texts()),
        transform=make_transform("clip", 24),
        seed=3,
        targets={"itm": objective.targets},
        needs=[objective.needs],
    )
    pairs, match = np.arange(40), np.arange(40) % 2 == 1
    batch = maker(Cut(pairs, np.zeros(40, np.int64), match))
    rows = batch.targets["itm"]["pairs"]
    assert batch.targets["itm"]["labels"].tolist() == match.astype(int).tolist()
    assert torch.equal(rows[:, 1], batch.pairs[:, 1])
    equal = batch.image_ids[rows[:, 0]].numpy() == index.sample_of(pairs)
    assert np.array_equal(equal, match)
    own = len(batch.pairs[:, 0].unique())
    assert len(batch.images) == own if negatives == "batch" else len(batch.images) > own


def test_vqa_scores_are_those_of_the_known_answers():
    entries = [{"answers": {"yes": 0.9, "perhaps": 1.0, "no": 0.3}}, {"answers": {"perhaps": 1.0}}, {"answers": {}}]
    targets = VQATargets(ANSWERS)(make_draft([0, 0, 0], entries=entries))
    torch.testing.assert_close(targets["scores"], torch.tensor([[0, 0, 0.3, 0.9], [0.0] * 4, [0.0] * 4]))
    assert targets["answered"].tolist() == [True, True, False]


def test_a_vqa_score_out_of_range():
    entries = [{"id": 1, "answers": {"yes": 0.9}}, {"id": 52, "answers": {"no": 3}}]
    with pytest.raises(DataError, match="question 52, answer 'no': the score 3 is out of range: 0 to 1"):
        VQATargets(ANSWERS)(make_draft([0, 0], entries=entries))


def vqa_batch(entries: list[dict]):
    draft = make_draft([0, 1, 1, 0], make_texts(4), entries=entries)
    return make_batch(draft.texts, draft.pairs, {"vqa": VQATargets(ANSWERS)(draft)}, entries=entries)


ENTRIES = [
    {"id": 7, "question": "is it round?", "answers": {"yes": 1.0}, "raw_answers": ["yes"] * 10, "type": "yes/no"},
    {"id": 8, "question": "what shape?", "answers": {"circle": 0.6, "blue": 0.3}, "type": "other"},
    {
        "id": 9,
        "question": "what colour?",
        "answers": {"mauve": 1.0},
        "raw_answers": ["mauve"] * 8 + ["The circle."] * 2,
        "type": "other",
    },
    {"id": 3, "question": "is it?", "answers": {}, "type": None},
]


def test_vqa_loss_and_scores_per_type():
    model = TaskModel(make_tower(), {"vqa": VQA(CONTEXT)}).eval()
    head = model.objectives["vqa"].head[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 2.0, -1.0, 1.0]))  # "circle" is always rated best
    batch = vqa_batch(ENTRIES)
    result = model(batch)["vqa"]
    # The last question has no answer: no loss and no score.
    assert result.metrics["score"].tolist() == pytest.approx([0, 0.6, 0])
    assert result.metrics["score_yes_no"].tolist() == [0]
    assert result.metrics["score_other"].tolist() == pytest.approx([0.6, 0])
    # "circle" is among the annotators' answers of the third alone; the second and the last have none.
    assert result.metrics["accuracy"].tolist() == pytest.approx([0, 0.6])
    assert result.metrics["accuracy_yes_no"].tolist() == [0]
    assert result.metrics["accuracy_other"].tolist() == pytest.approx([0.6])
    assert len(result.metrics) == 6
    probability = [1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0, 1.0)]
    scores = [[0, 0, 0, 1], [0.3, 0.6, 0, 0], [0] * 4]
    loss = -sum(
        y * math.log(p) + (1 - y) * math.log(1 - p) for row in scores for y, p in zip(row, probability, strict=True)
    )
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert model.counts(batch).tolist() == [3]
    assert model.train()(batch)["vqa"].metrics == {}
    # A batch without a single answer, of a test split.
    batch = vqa_batch([ENTRIES[3]] * 4)
    result = model.eval()(batch)["vqa"]
    assert result.loss.item() == 0 and result.metrics == {} and model.counts(batch).tolist() == [0]


def test_vqa_predictions():
    logits = torch.tensor([[0.0, -1, -2, 3], [1.0, 0, 0, 0], [0.0, 0, 2, 0], [-3.0, -4, -4, -4]])
    found = VQA(CONTEXT).predictions(vqa_batch(ENTRIES), Result(torch.zeros(()), outputs={"logits": logits}))
    assert found[0] == {
        "question_id": 7,
        "image": "image-0",
        "question": "is it round?",
        "answer": "yes",
        "probability": 0.9526,
        "truth": "yes",
        "score": 1.0,
        "accuracy": 1.0,
    }
    assert [row["answer"] for row in found] == ["yes", "blue", "no", "blue"]
    assert [row["score"] for row in found] == [1.0, 0.3, 0.0, None]
    assert [row.get("accuracy") for row in found] == [1.0, None, 0.0, None]
    assert [row["truth"] for row in found] == ["yes", "circle", "mauve", None]
    assert [row["image"] for row in found] == ["image-0", "image-1", "image-1", "image-0"]


def test_vqa_submission_has_every_question_once():
    rows = [{"question_id": n, "answer": a, "probability": 0.5} for n, a in ((7, "yes"), (3, "no"), (7, "blue"))]
    listed = [{"question_id": 7, "answer": "yes"}, {"question_id": 3, "answer": "no"}]
    assert VQA(CONTEXT).files(rows, "test-dev") == {"vqa-submission-test-dev.json": listed}


def test_itc_texts_of_one_image_share_its_target():
    model = TaskModel(make_tower(), {"itc": ITC(CONTEXT, size=8, temperature=0.2)}).train()
    # Pairs 0 and 2 are of one image.
    batch = make_batch(make_texts(3), [[0, 2], [1, 0], [0, 1]], {"itc": {"pair": torch.arange(3)}})
    result = model(batch)["itc"]
    with torch.no_grad():
        head = model.objectives["itc"]
        images = head.image_head(model.tower.encode_images(batch.images).cls)[[0, 1, 0]].tolist()
        texts = head.text_head(model.tower.encode_texts(batch.texts).cls)[[2, 0, 1]].tolist()
    similarity = [[sum(a * b for a, b in zip(i, t, strict=True)) / 0.2 for t in texts] for i in images]

    def direction(logits):
        log_share = [[x - math.log(sum(map(math.exp, row))) for x in row] for row in logits]
        return -(log_share[0][0] + log_share[0][2]) / 2 - log_share[1][1] - (log_share[2][0] + log_share[2][2]) / 2

    transposed = [list(row) for row in zip(*similarity, strict=True)]
    assert result.loss.item() == pytest.approx((direction(similarity) + direction(transposed)) / 2, rel=1e-5)
    right = [{0, 2}, {1}, {0, 2}]
    hits = [max(range(3), key=row.__getitem__) in own for row, own in zip(similarity, right, strict=True)]
    assert result.metrics["image_to_text_accuracy"].tolist() == [float(hit) for hit in hits]
