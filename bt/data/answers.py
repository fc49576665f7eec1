"""Answers of VQA data sets: one spelling for each, the vocabulary, soft scores (official glossary.py, write_vqa.py).

And the accuracy of the official VQA evaluation (vqaEval.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache

from bt.errors import ConfigError

NORMALISE = ("official", "fixed", "none")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

# What is written right; the table holds each of them with one apostrophe missing, for every apostrophe.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _misspelt(words: Iterable[str]) -> dict[str, str]:
    """Each word with one of its apostrophes missing -> the word."""
    return {word[:i] + word[i + 1 :]: word for word in words for i, letter in enumerate(word) if letter == "'"}


# The released table has this entry the wrong way round.
_OFFICIAL = _misspelt(_CONTRACTIONS) | {"somebody'd": "somebodyd"}
# There the first three begin with a capital, which lower-cased words never match, and two stand for themselves.
_FIXED = _misspelt([*_CONTRACTIONS, "i'd've", "i'm", "i've", "let's", "she's", "somebody'd"])


@lru_cache(maxsize=1 << 20)  # VQAv2 has 6.6 million answers, of which few differ
def normalise(answer: str, how: str) -> str:
    """One spelling for the variants of an answer.

    how="official": as the released glossary does it, with its defects, which decide the classes of released
    checkpoints: a sign of punctuation that has a space beside it somewhere, or any sign where a comma stands between
    digits, is deleted everywhere ("1,000/2" -> "10002"), else it becomes a space ("red/white" -> "red white"); then
    periods that no digit follows go, 32 of them at most; then lower case, numbers up to ten as digits ("none" too),
    no articles, apostrophes put into contractions.
    how="fixed": the same with these mended: each sign of punctuation is judged by itself (commas between digits are
    deleted, all else becomes a space); every period that no digit follows goes; contractions that the table has in
    capitals, reversed or as themselves ("im", "ive", "id've", "somebodyd", "lets", "shes") get their apostrophe; an
    answer of articles alone ("a") stays.
    how="none": as it is.
    """
    if how == "none":
        return answer
    if how not in NORMALISE:
        raise ConfigError(f"answers.normalise={how}: allowed are {', '.join(NORMALISE)}")
    official = how == "official"
    text = _without_punctuation(answer) if official else _without_each_sign(answer)
    # The released code hands re.UNICODE (32) to the parameter for the number of replacements.
    text = _PERIOD.sub("", text, count=32 if official else 0)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in _ARTICLES]
    if not official and not kept:
        kept = words
    contractions = _OFFICIAL if official else _FIXED
    return " ".join(contractions.get(word, word) for word in kept)


def _without_punctuation(answer: str) -> str:
    """What becomes of a sign depends on the whole answer."""
    number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for sign in _PUNCTUATION:
        if sign in text:
            delete = number or f"{sign} " in answer or f" {sign}" in answer
            text = text.replace(sign, "" if delete else " ")
    return text


def _without_each_sign(answer: str) -> str:
    return _COMMA_IN_NUMBER.sub("", answer).translate(dict.fromkeys(map(ord, _PUNCTUATION), " "))


def vocabulary(answers: Iterable[str], minimum: int) -> list[str]:
    """The answers that occur at least `minimum` times, in the order of their first occurrence: the classes."""
    return [answer for answer, number in Counter(answers).items() if number >= minimum]


def soft_scores(answers: Iterable[str], known: Container[str]) -> dict[str, float]:
    """Score by answer of those that are known, in the order of their first occurrence: 0.3, 0.6 and 0.9 for one, two
    and three of the annotators, 1 for more."""
    counts = Counter(answers)
    return {answer: (0.3, 0.6, 0.9, 1.0)[min(number, 4) - 1] for answer, number in counts.items() if answer in known}


def official_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """What the official VQA evaluation (visualqa.org, vqaEval.py) gives for an answer, in [0, 1].

    min(n / 3, 1) with the n annotators that agree, averaged over the subsets that leave one of them out. Where all
    say the same, the answer must equal it letter by letter; where they do not, all are spelt by `normalise`,
    how="official", which is this evaluation's own processing, defects included. annotators: their answers as they are,
    ten in VQA.
    """
    said = [_bare(text) for text in annotators]
    answer = _bare(answer)
    if len(set(said)) > 1:
        answer, *said = (normalise(text, "official") for text in (answer, *said))
    agree = [text == answer for text in said]
    return sum(min((sum(agree) - left_out) / 3, 1.0) for left_out in agree) / len(agree)


def _bare(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
