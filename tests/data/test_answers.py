import random
from itertools import combinations

import pytest

from bt.data.answers import normalise, official_accuracy, soft_scores, vocabulary
from bt.errors import ConfigError

# What the released glossary (BridgeTower, src/utils/glossary.py) makes of these, and what its mended form must.
SPELLINGS = [
    ("Yes.", "yes", "yes"),
    ("The Red car", "red car", "red car"),
    ("red/white", "red white", "red white"),
    ("1,000/2", "10002", "1000 2"),  # one comma between digits decides over all signs
    ("1,000", "1000", "1000"),
    ("a-b - c-d", "ab cd", "b c d"),  # as does one sign beside a space over all of its kind
    ("n/a", "n", "n"),
    ("50%", "50%", "50%"),
    ("10:30", "10:30", "10:30"),
    ("3.", "3", "3"),
    ("3.5", "3.5", "3.5"),
    ("U.S.", "us", "us"),
    ("." * 40 + "x", "." * 8 + "x", "x"),
    ("None", "0", "0"),
    ("ten or eleven", "10 or eleven", "10 or eleven"),
    ("a", "", "a"),
    ("a, b", "b", "b"),
    ("-", "", ""),
    ("dont know", "don't know", "don't know"),
    ("Hadn'tve", "hadn't've", "hadn't've"),
    ("yall'd've", "y'all'd've", "y'all'd've"),
    ("'ows'at", "'ow's'at", "'ow's'at"),
    ("Im", "im", "i'm"),
    ("I'dve", "i'dve", "i'd've"),
    ("somebody'd", "somebodyd", "somebody'd"),
    ("somebodyd", "somebodyd", "somebody'd"),
    ("shes", "shes", "she's"),
    ("its", "its", "its"),
    ("  two\tbig   dogs ", "2 big dogs", "2 big dogs"),
    ("café", "café", "café"),
]


@pytest.mark.parametrize(("answer", "official", "fixed"), SPELLINGS)
def test_spellings(answer, official, fixed):
    assert normalise(answer, "official") == official
    assert normalise(answer, "fixed") == fixed
    assert normalise(answer, "none") == answer


def test_unknown_spelling_is_an_error():
    with pytest.raises(ConfigError, match="answers.normalise=new: allowed are official, fixed, none"):
        normalise("yes", "new")


def test_vocabulary_keeps_the_order_of_first_occurrence():
    answers = ["net", "yes", "rare", "yes", "no", "net", "no", "yes", "no"]
    assert vocabulary(answers, 2) == ["net", "yes", "no"]
    assert vocabulary(answers, 3) == ["yes", "no"]


def test_soft_scores():
    said = ["no", "yes", "red", "yes", "blue", "blue", "blue", "red", "red", "red", "odd"]
    scores = soft_scores(said, {"yes", "red", "blue", "no"})
    assert list(scores.items()) == [("no", 0.3), ("yes", 0.6), ("red", 1.0), ("blue", 0.9)]
    assert soft_scores(["yes"] * 10, {"yes"}) == {"yes": 1.0} and soft_scores(["odd"] * 10, {"yes"}) == {}


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_by_the_number_of_annotators_that_agree(agreeing, accuracy):
    """By hand: with 2 of 10, two subsets of nine hold 1 of them and eight hold 2: (2 x 1/3 + 8 x 2/3) / 10 = 0.6."""
    assert official_accuracy("red", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(accuracy)


# What the official evaluation (vqaEval.py) gives, which was run on these.
ACCURACIES = [
    ("us", ["U.S."] * 9 + ["america"], 1.0),  # answers that differ are all spelt alike first
    ("us", ["U.S."] * 10, 0.0),  # where all say the same nothing is: not a single one said "us"
    ("U.S.", ["U.S."] * 10, 1.0),
    ("2", ["two"] * 10, 0.0),
    ("2", ["two"] * 2 + ["no"] * 8, 0.6),
    ("none", ["0"] * 3 + ["1"] * 7, 0.9),
    ("the red", ["a red"] * 2 + ["red."] * 1 + ["blue"] * 7, 0.9),
    ("red white", ["red/white"] * 2 + ["red, white"] * 2 + ["pink"] * 6, 1.0),
    ("yes", [" yes\n"] * 10, 1.0),  # line ends and margins go in any case
    ("dont know", ["don't know"] + ["no"] * 9, 0.3),
    ("1000", ["1,000"] * 2 + ["many"] * 8, 0.6),
    ("Red", ["red"] * 10, 0.0),
]


@pytest.mark.parametrize(("answer", "annotators", "accuracy"), ACCURACIES)
def test_accuracy_of_answers_that_are_spelt_differently(answer, annotators, accuracy):
    assert official_accuracy(answer, annotators) == pytest.approx(accuracy)


def test_accuracy_is_the_mean_over_the_subsets_of_nine():
    """The definition of visualqa.org/evaluation, word by word."""
    draw, pool = random.Random(0), ["yes", "no", "2", "red", "a dog"]
    for _ in range(500):
        said = [draw.choice(pool[: draw.choice([2, 3, 5])]) for _ in range(10)]
        answer = draw.choice(pool)
        if len(set(said)) == 1:
            continue
        spelt, answer_spelt = [text.removeprefix("a ") for text in said], answer.removeprefix("a ")
        subsets = list(combinations(spelt, 9))
        expected = sum(min(subset.count(answer_spelt) / 3, 1) for subset in subsets) / len(subsets)
        assert len(subsets) == 10 and official_accuracy(answer, said) == pytest.approx(expected)
