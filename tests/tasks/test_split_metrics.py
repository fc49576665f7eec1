"""Figures over a whole split: NLVR2's consistency, and GLUE's metrics against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bt.data.sources.glue import TASKS
from bt.tasks.glue import GLUE
from bt.tasks.nlvr2 import NLVR2, consistency
from tests.tasks.test_classification import TWO, context


def glue(task: str) -> GLUE:
    return GLUE(context(*(TASKS[task].classes or {}).values()), task)


def rows_of(task: str, predictions, truths, **more) -> list[dict]:
    classes = list((TASKS[task].classes or {}).values())
    name = (lambda value: classes[value]) if classes else float
    return [
        {"id": n, **more, "prediction": name(p), "truth": name(t)}
        for n, (p, t) in enumerate(zip(predictions, truths, strict=True))
    ]


def test_consistency_counts_sentences_over_their_pairs():
    """Two sets of dev, of which one wrote two sentences; set 7 exists in another split too."""
    judged = [
        ("dev-7-0-0", True), ("dev-7-1-0", True), ("dev-7-3-0", True),  # consistent
        ("dev-7-0-1", True), ("dev-7-1-1", False),  # not, though its pairs are those of the other sentence
        ("dev-8-0-0", False), ("dev-8-2-0", False),  # not
        ("test1-7-0-1", True),  # another split's
    ]  # fmt: skip
    assert consistency(judged) == {"consistency": 2 / 4}
    assert consistency(judged[::-1]) == {"consistency": 2 / 4}
    assert consistency([]) == {} and consistency([("17", True)]) == {}


def test_nlvr2_summary_leaves_out_statements_without_labels():
    rows = [
        {"id": "test1-1-0-0", "prediction": "True", "truth": "True"},
        {"id": "test1-1-1-0", "prediction": "True", "truth": None},
        {"id": "test1-2-0-0", "prediction": "True", "truth": "False"},
    ]
    assert NLVR2(TWO).summary(rows) == {"consistency": 0.5}
    assert NLVR2(TWO).summary([{**row, "truth": None} for row in rows]) == {}


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "qnli", "rte"])
def test_two_classes(task):
    rng = np.random.default_rng(len(task))
    truth = (rng.random(1503) < 0.7).astype(int)
    chosen = np.where(rng.random(1503) < 0.6, truth, rng.integers(0, 2, 1503))
    found = glue(task).summary(rows_of(task, chosen, truth))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, chosen), abs=1e-12)
    special = {"cola": ("matthews", matthews_corrcoef), "mrpc": ("f1", f1_score), "qqp": ("f1", f1_score)}
    name, function = special.get(task, ("accuracy", accuracy_score))
    assert found[name] == pytest.approx(function(truth, chosen), abs=1e-7)
    assert found["score"] == found[name] and 0.3 < found["score"] < 0.95
    assert set(found) == {"accuracy", "score", name}


@pytest.mark.parametrize("constant", [0, 1])
def test_predictions_that_are_all_the_same(constant):
    truth = [1, 0, 1, 1, 0, 1, 1]
    chosen = [constant] * len(truth)
    assert glue("cola").summary(rows_of("cola", chosen, truth))["matthews"] == matthews_corrcoef(truth, chosen) == 0
    assert glue("cola").summary(rows_of("cola", [1, 1], [1, 1]))["matthews"] == 0
    f1 = glue("mrpc").summary(rows_of("mrpc", chosen, truth))["f1"]
    assert f1 == pytest.approx(f1_score(truth, chosen, zero_division=0), abs=1e-7)
    assert glue("stsb").summary(rows_of("stsb", chosen, truth)) == {"pearson": 0, "spearman": 0, "score": 0}


@pytest.mark.parametrize("ties", [False, True])
def test_stsb_correlations(ties):
    rng = np.random.default_rng(3)
    truth = np.round(rng.random(1500) * 25) / 5
    scores = truth + rng.normal(0, 1.5, 1500)
    scores = np.round(scores) if ties else scores
    found = glue("stsb").summary(rows_of("stsb", scores, truth))
    assert found["pearson"] == pytest.approx(pearsonr(scores, truth)[0], abs=1e-12)
    assert found["spearman"] == pytest.approx(spearmanr(scores, truth)[0], abs=1e-6)
    assert found["score"] == found["spearman"] and 0.5 < found["score"] < 0.9
    assert set(found) == {"pearson", "spearman", "score"}


def test_mnli_is_the_mean_of_its_parts():
    """Parts of different sizes: 3 of 4 and 1 of 2 right, each part as one."""
    rows = rows_of("mnli", [0, 1, 2, 0], [0, 1, 2, 1], part="matched")
    rows += rows_of("mnli", [2, 2], [2, 0], part="mismatched")
    assert glue("mnli").summary(rows) == {
        "accuracy_matched": 0.75,
        "accuracy_mismatched": 0.5,
        "accuracy": 0.625,
        "score": 0.625,
    }
    assert glue("mnli").summary(rows[:4]) == {"accuracy_matched": 0.75, "accuracy": 0.75, "score": 0.75}
    train = rows_of("mnli", [0, 1], [0, 2])
    assert glue("mnli").summary(train) == {"accuracy": 0.5, "score": 0.5}


def test_samples_without_labels_count_for_nothing():
    rows = rows_of("cola", [1, 0, 1], [1, 0, 0])
    assert glue("cola").summary([*rows, {"id": 3, "prediction": "acceptable", "truth": None}]) == glue("cola").summary(
        rows
    )
    assert glue("mnli").summary([{"id": 0, "part": "matched", "prediction": "neutral", "truth": None}]) == {}
