"""Lines for GLUE's eight tasks, whose labels follow from the words; classes are balanced.

What the sentences say is taken from the pictures of a collection: (text, second text or None, label as GLUE writes it).
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from bt.samples.collection import Collection, Item
from bt.samples.words import captions, other_value

_GOOD = "beautiful brilliant charming delightful excellent lovely splendid wonderful".split()
_BAD = "awful boring clumsy dreadful horrible terrible ugly unpleasant".split()

Line = tuple[str, str | None, str]


def line(task: str, collection: Collection, item: Item, draw: random.Random, genre: str = "album") -> Line:
    """One line of a task (a name of bt.data.sources.glue.TASKS). genre: of MNLI, "album" or "letter": the frame of its
    premises, so that mismatched ones look other than those of training."""
    if task == "mnli":
        return _mnli(collection, item, draw, genre)
    return _TASKS[task](collection, item, draw)


def tell(collection: Collection, facts: Mapping[str, str]) -> str:
    """A sentence of these facts, in this order."""
    return " and ".join(collection.facts[name].statement(value) for name, value in facts.items())


def _shuffled(facts: Mapping[str, str], draw: random.Random) -> dict[str, str]:
    return dict(draw.sample(list(facts.items()), len(facts)))


def _changed(collection: Collection, facts: Mapping[str, str], count: int, draw: random.Random) -> dict[str, str]:
    """The facts with `count` other values."""
    names = draw.sample(list(facts), count)
    return {n: other_value(collection, n, value, draw) if n in names else value for n, value in facts.items()}


def _cola(collection: Collection, item: Item, draw: random.Random) -> Line:
    """Acceptable: a statement; unacceptable: its words in another order."""
    words = tell(collection, dict([draw.choice(list(item.facts.items()))])).split()
    if draw.random() < 0.5:
        return " ".join(words), None, "1"
    mixed = words
    while mixed == words:
        mixed = draw.sample(words, len(words))
    return " ".join(mixed), None, "0"


def _sst2(collection: Collection, item: Item, draw: random.Random) -> Line:
    """An adjective decides, and "anything but" turns it round: the adjective alone gives half."""
    good, denied = draw.random() < 0.5, draw.random() < 0.5
    adjective = draw.choice(_GOOD if good else _BAD)
    judged = f"this picture of {item.title} is {'anything but ' if denied else ''}{adjective}"
    return judged, None, str(int(good != denied))


def _mrpc(collection: Collection, item: Item, draw: random.Random) -> Line:
    """Two wordings of the same facts, or of facts of which one differs."""
    same = draw.random() < 0.5
    facts = item.facts if same else _changed(collection, item.facts, 1, draw)
    return captions(collection, item)[0], tell(collection, _shuffled(facts, draw)), str(int(same))


def _stsb(collection: Collection, item: Item, draw: random.Random) -> Line:
    """Five times the share of facts that are equal."""
    different = draw.randint(0, len(item.facts))
    facts = _changed(collection, item.facts, different, draw)
    score = 5 * (1 - different / len(facts))
    return tell(collection, item.facts), tell(collection, _shuffled(facts, draw)), f"{score:.3f}"


def _qqp(collection: Collection, item: Item, draw: random.Random) -> Line:
    """Two wordings of a question on the same value, or on two values of a fact."""
    name = draw.choice(list(item.facts))
    fact, value, same = collection.facts[name], item.facts[name], draw.random() < 0.5
    other = value if same else other_value(collection, name, value, draw)
    return fact.question(value), f"is it true that {fact.statement(other)}?", str(int(same))


def _qnli(collection: Collection, item: Item, draw: random.Random) -> Line:
    """Whether a sentence of two facts answers a question on one."""
    names = draw.sample(list(item.facts), 3)
    answered = draw.random() < 0.5
    told = _shuffled({name: item.facts[name] for name in (names[:2] if answered else names[1:])}, draw)
    return collection.facts[names[0]].ask, tell(collection, told), "entailment" if answered else "not_entailment"


def _inference(collection: Collection, item: Item, label: str, draw: random.Random) -> tuple[str, str]:
    """Premise of all facts but one, and a hypothesis: one of them, one of them with another value, or the missing
    one with any value, each fact and each value as often whatever the label."""
    name = draw.choice(list(item.facts))
    value = item.facts[name]
    told = {other: told for other, told in item.facts.items() if other != name}
    if label == "neutral":
        value = draw.choice([value, other_value(collection, name, value, draw)])
    else:
        told.pop(draw.choice(list(told)))
        told[name] = value
        if label == "contradiction":
            value = other_value(collection, name, value, draw)
    return tell(collection, _shuffled(told, draw)), collection.facts[name].statement(value)


def _mnli(collection: Collection, item: Item, draw: random.Random, genre: str) -> Line:
    label = draw.choice(["entailment", "neutral", "contradiction"])
    premise, hypothesis = _inference(collection, item, label, draw)
    return premise if genre == "album" else f"dear friend, let me tell you that {premise}", hypothesis, label


def _rte(collection: Collection, item: Item, draw: random.Random) -> Line:
    label = draw.choice(["entailment", "entailment", "neutral", "contradiction"])
    premise, hypothesis = _inference(collection, item, label, draw)
    return premise, hypothesis, "entailment" if label == "entailment" else "not_entailment"


_TASKS = {"cola": _cola, "sst2": _sst2, "mrpc": _mrpc, "stsb": _stsb, "qqp": _qqp, "qnli": _qnli, "rte": _rte}
