"""Evaluation of retrieval against a slow reference, by hand, on several ranks, with little room and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bt.engine.distributed import World
from bt.engine.evaluate import evaluate as measure
from bt.errors import ConfigError
from bt.models.bridgetower import Need
from bt.tasks import gallery, retrieval
from bt.tasks.base import Measuring, TaskModel
from bt.tasks.gallery import Chunk, NonFiniteScore
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM
from bt.tasks.recall import Ranks
from bt.tasks.retrieval import Retrieval
from tests.engine.test_distributed import ROOT, torchrun
from tests.models.towers import make_images, make_tower
from tests.tasks.helpers import CONTEXT
from tests.tasks.retrieval_ranks import IMAGE_OF, OPTIONS, TEXT_OF, evaluate, make_batches, make_model, texts_of

ALONE = World(0, 1, torch.device("cpu"))
PLENTY = Measuring("test")


def recalls(scores: list[list[float]]) -> dict[str, float]:
    """By definition, from scores (images, captions); a hit has to be better than every wrong one among k."""
    found = {}
    for k in (1, 5, 10):
        hits = []
        for image, row in enumerate(scores):
            best = max(score for score, owner in zip(row, IMAGE_OF, strict=True) if owner == image)
            hits.append(sum(s >= best for s, owner in zip(row, IMAGE_OF, strict=True) if owner != image) < k)
        found[f"tr_r{k}"] = sum(hits) / len(hits)
        hits = []
        for caption, owner in enumerate(IMAGE_OF):
            column = [row[caption] for row in scores]
            hits.append(sum(s >= column[owner] for image, s in enumerate(column) if image != owner) < k)
        found[f"ir_r{k}"] = sum(hits) / len(hits)
    return found


def test_bad_images_count_once_without_metrics_of_batches():
    """Though states for which there is no room make the evaluator go over the batches again."""
    model, batches = make_model(), make_batches(4)
    model.batch_metrics, model.evaluators = False, {"retrieval": Retrieval(**OPTIONS["all"], pairs=7)}
    batches[0].skipped = {"test-000000.tar: cut": 2}
    batches[3].skipped = {"test-000000.tar: cut": 1, "test-000001.tar: no image": 1}
    measured = measure(model, batches, ALONE, Measuring("test", cache_bytes=0))
    assert measured.skipped == {"test-000000.tar: cut": 3, "test-000001.tar: no image": 1}
    assert measured.metrics.keys() > {"retrieval/test/tr_r1"} and measured.rows == {}


@pytest.fixture(scope="module")
@torch.no_grad()
def expected() -> dict[str, dict[str, float]]:
    """Every pair by itself through the model."""
    model = make_model()
    images = [model.tower.encode_images(image[None]) for image in make_images(11)]
    texts = [model.tower.encode_texts(texts_of([text])) for text in TEXT_OF]
    itc = model.objectives["itc"]
    one = torch.zeros(1, 2, dtype=torch.long)

    def logit(image, text) -> float:
        return model.objectives["itm"].head(model.tower.fuse(image, text, one, Need(cls=True)).cls)[0, 1].item()

    scores = np.array([[logit(image, text) for text in texts] for image in images])
    # Pairs of equal images and words tie, which the rounding of single passes must not undo.
    similar = np.array([[(itc.image_features(i) @ itc.text_features(t).T).item() for t in texts] for i in images])
    nearest = np.zeros(scores.shape, bool)
    np.put_along_axis(nearest, similar.argsort(1)[:, ::-1][:, :3], True, 1)
    np.put_along_axis(nearest, similar.argsort(0)[::-1][:3], True, 0)
    found = {"all": scores, "k": np.where(nearest, scores, -100), "similarity": similar}
    return {case: recalls(values.round(5).tolist()) for case, values in found.items()}


@pytest.mark.parametrize("size", [20, 7, 1])
@pytest.mark.parametrize("case", OPTIONS)
def test_against_every_pair_by_itself(case, size, expected):
    found = evaluate(case, size, ALONE, PLENTY, pairs=5)
    assert {key: found[key] for key in expected[case]} == pytest.approx(expected[case])
    assert 0.1 < found["r_mean"] < 0.9, "a case in which something is to be found and something to be missed"
    assert found["tr_mean"] == pytest.approx(sum(expected[case][f"tr_r{k}"] for k in (1, 5, 10)) / 3)
    assert found["r_mean"] == pytest.approx((found["tr_mean"] + found["ir_mean"]) / 2)
    assert found["rsum"] == pytest.approx(sum(expected[case].values()))


def test_the_cases_differ(expected):
    assert len({json.dumps(found) for found in expected.values()}) == 3


def test_each_pair_of_image_and_words_is_scored_once(monkeypatch):
    """11 images with 18 different texts, the right pairs in the first pass; images and texts encoded once."""
    count = {"pairs": 0, "images": 0, "texts": 0}
    tower = type(make_tower())
    for name, size in (
        ("fuse", lambda images, texts, pairs, need: ("pairs", len(pairs))),
        ("encode_images", lambda images: ("images", len(images))),
        ("encode_texts", lambda texts: ("texts", len(texts.ids))),
    ):

        def counted(self, *arguments, inner, size):
            kind, number = size(*arguments)
            count[kind] += number
            return inner(self, *arguments)

        monkeypatch.setattr(tower, name, partialmethod(counted, inner=getattr(tower, name), size=size))
    evaluate("all", 20, ALONE, PLENTY)
    right = len(set(zip(IMAGE_OF, TEXT_OF, strict=True)))
    assert count == {"pairs": len(IMAGE_OF) + 11 * 18 - right, "images": 11, "texts": 18}


@pytest.mark.parametrize("room", ["disk", "none", "some"])
@pytest.mark.parametrize("case", ["all", "k"])
def test_little_room(case, room, tmp_path, monkeypatch, expected):
    """States on disk; nowhere, so that images and texts are encoded again; and some of each."""
    again = []
    encoded_again = gallery.Gallery._encoded_again
    monkeypatch.setattr(
        gallery.Gallery, "_encoded_again", lambda self, number: again.append(number) or encoded_again(self, number)
    )
    how = Measuring("test", work_dir=tmp_path if room == "disk" else None, cache_bytes=20_000 if room == "some" else 0)
    found = evaluate(case, 4, ALONE, how)
    assert {key: found[key] for key in expected[case]} == pytest.approx(expected[case])
    assert again == {"disk": [], "none": [0, 1, 2, 3, 4], "some": [2, 3, 4]}[room]
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_half_of_the_bytes(monkeypatch, expected):
    kinds = []
    add = gallery.TensorStore.add
    monkeypatch.setattr(gallery.TensorStore, "add", lambda self, t: kinds.append(self.dtype) or add(self, t))
    found = evaluate("all", 7, ALONE, PLENTY, half=True)
    assert set(kinds) == {torch.float16}
    assert {key: found[key] for key in expected["all"]} == pytest.approx(expected["all"], abs=0.15)
    kinds.clear()
    evaluate("all", 7, ALONE, Measuring("test", precision="bf16"))
    assert set(kinds) == {torch.float16}
    kinds.clear()
    evaluate("all", 7, ALONE, PLENTY)
    assert set(kinds) == {torch.float32}


def test_two_ranks(expected, tmp_path):
    """Seven batches of three captions, the last one of two; and a single batch, so that a rank has nothing."""
    cases = ["all:3", "k:3", "similarity:3", "k:20"]
    torchrun(2, "tests.tasks.retrieval_ranks", tmp_path / "out.json", tmp_path / "work", 0, *cases)
    for case, (one, other) in zip(cases, json.loads((tmp_path / "out.json").read_text()), strict=True):
        wanted = expected[case.split(":")[0]]
        assert one == other and {key: one[key] for key in wanted} == pytest.approx(wanted), case
    assert list((tmp_path / "work").iterdir()) == []


def test_a_killed_evaluation_goes_on(tmp_path, monkeypatch, expected):
    work = tmp_path / "work"
    command = [sys.executable, "-m", "tests.tasks.retrieval_ranks", str(tmp_path / "out"), str(work), "0.05", "all:3"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    done, deadline = 0, time.monotonic() + 120
    while done < 3:
        assert process.poll() is None and time.monotonic() < deadline
        for path in work.glob("retrieval-*.npz"):
            done = int(np.load(path)["done"])
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    names = [path.name for path in work.iterdir() if not path.name.startswith(".")]
    assert len(names) == 1, "what was kept of states is gone with the process"
    scored = []
    fused = Retrieval._fused
    monkeypatch.setattr(
        Retrieval, "_fused", staticmethod(lambda *arguments: scored.append(arguments[1].batch) or fused(*arguments))
    )
    # Another identity, other weights or options start from the beginning.
    how = Measuring("test", work_dir=work, identity="another")
    evaluate("all", 3, ALONE, how)
    assert scored == [0, 1, 2, 3, 4, 5, 6]
    scored.clear()
    found = evaluate("all", 3, ALONE, Measuring("test", work_dir=work, identity="one"))
    assert scored and scored == list(range(7))[-len(scored) :] and len(scored) <= 7 - done
    assert {key: found[key] for key in expected["all"]} == pytest.approx(expected["all"])
    assert [path.name for path in work.iterdir() if path.suffix == ".npz" and path.name[0] != "."] == []


def test_other_weights_have_another_fingerprint():
    model = make_model()
    before = retrieval.fingerprint(model)
    assert before == retrieval.fingerprint(make_model())
    with torch.no_grad():
        model.tower.text_pooler.dense.bias[3] += 1e-4
    assert retrieval.fingerprint(model) != before


def ranks_of(scores: list[list[float]], owner: list[int], slot: list[int], cut: int) -> Ranks:
    """Scores (images, slots) counted in two chunks."""
    owner, slot = np.array(owner), np.array(slot)
    images, captions = len(scores), len(owner)

    def own_pairs(chunk: Chunk):
        found = np.flatnonzero((owner >= chunk.first) & (owner < chunk.images.stop))
        return torch.tensor(found), torch.tensor(owner[found] - chunk.first), torch.tensor(slot[found])

    table = torch.tensor(scores)
    held = SimpleNamespace(
        images=images,
        captions=captions,
        caption_image=owner,
        caption_slot=slot,
        slots=table.shape[1],
        own_pairs=own_pairs,
    )
    ranks = Ranks(held, table[owner, slot])
    for first, last in ((0, cut), (cut, images)):
        ranks.add(Chunk(first, np.arange(last - first), 0, 0, None), table[first:last].clone())
    return ranks


@pytest.mark.parametrize("cut", [1, 2])
def test_ranks_by_hand(cut):
    """Three images; captions 0 and 1 of image 0, 2 of image 1, 3 and 4 of image 2; captions 1 and 4 say the same."""
    none = -torch.inf
    scores = [
        [0.9, 0.2, 0.5, 0.9],  # caption 3 ties with the best right one
        [0.1, 0.7, 0.6, none],  # captions 1 and 4 are both better than caption 2
        [0.3, 0.8, none, 0.4],  # caption 4's words are right, and caption 1's equal ones wrong: a tie
    ]
    ranks = ranks_of(scores, [0, 0, 1, 2, 2], [0, 1, 2, 3, 1], cut)
    assert ranks.captions.tolist() == [1, 2, 1]
    # Caption 1 (0.2) is beaten by images 1 and 2, caption 3 (0.4) by image 0.
    assert ranks.images.tolist() == [0, 2, 0, 1, 0]
    found = ranks.recalls()
    assert (found["tr_r1"], found["ir_r1"]) == (0, 3 / 5)
    assert found["tr_r5"] == found["ir_r10"] == 1
    assert found["rsum"] == pytest.approx(0 + 1 + 1 + 0.6 + 1 + 1)
    assert found["r_mean"] == pytest.approx((2 / 3 + 2.6 / 3) / 2)


def test_what_was_not_scored_is_behind_everything():
    none = -torch.inf
    ranks = ranks_of([[none, 0.1], [0.2, none]], [0, 1], [0, 1], 1)
    assert ranks.captions.tolist() == [1, 1] and ranks.images.tolist() == [1, 1]
    ranks = ranks_of([[none, none], [none, none]], [0, 1], [0, 1], 1)
    assert ranks.captions.tolist() == [1, 1] and ranks.images.tolist() == [1, 1], "nor is it a hit among its equals"


def test_scores_that_are_no_numbers_are_no_hits():
    model = make_model()
    with torch.no_grad():
        model.objectives["itm"].head.fc.bias.fill_(torch.nan)
        with pytest.raises(NonFiniteScore, match="not finite"):
            Retrieval("itm")(model, make_batches(7), ALONE, PLENTY)


def test_splits_that_are_not_asked_for_cost_nothing():
    evaluator = Retrieval("itm", splits=["test"])
    assert evaluator(make_model(), [None], ALONE, Measuring("val")) == {}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"ranker": None}, "ranker and contrast are both null"),
        ({"k_test": 3}, "Retrieval.k_test=3 needs both ranker and contrast"),
        ({"contrast": "itc", "k_test": 0}, "Retrieval.k_test=0: must be at least 1"),
        ({"pairs": 0}, "Retrieval.pairs=0: must be at least 1"),
        ({"ranker": "irtr"}, "Retrieval.ranker=irtr: the task's objectives allow itm, null"),
        ({"contrast": "itm"}, "Retrieval.contrast=itm: the task's objectives allow itc, null"),
    ],
)
def test_options_that_do_not_go(options, said):
    with pytest.raises(ConfigError, match=said):
        evaluators = {"retrieval": Retrieval(**options)}
        TaskModel(make_tower(), {"itc": ITC(CONTEXT), "itm": ITM(CONTEXT)}, evaluators)
