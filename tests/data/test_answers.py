import pytest

from bt.data.answers import normalise, soft_scores, vocabulary
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
