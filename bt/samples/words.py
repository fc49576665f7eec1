"""What is written of the pictures: captions, questions, hypotheses and statements, by rules from what is true of them.

Labels are balanced, so that whoever looks at one modality alone is near chance; each function says what that is.
"""

from __future__ import annotations

import random

from bt.samples.collection import Collection, Item, Question


def captions(collection: Collection, item: Item) -> list[str]:
    """The collection's templates, in order; the first names every fact."""
    words = {**item.facts, "title": item.title, "tags": ", ".join(item.tags) or item.title}
    return [template.format(**words) for template in collection.captions]


def questions(collection: Collection, item: Item, draw: random.Random) -> list[Question]:
    """Those that came with the picture, else for each fact the open question, one to which yes is the answer, and one
    to which no is, with any of the other values.

    By rule, the question alone gives half of the yes/no questions and, of the others, one among a fact's values. What
    came with easy-VQA gives more, see the README.
    """
    if item.questions:
        return list(item.questions)
    found = []
    for name, fact in collection.facts.items():
        value = item.facts[name]
        found.append(Question(fact.ask, value, fact.type))
        found.append(Question(fact.question(value), "yes", "yes/no"))
        found.append(Question(fact.question(other_value(collection, name, value, draw)), "no", "yes/no"))
    return found


def hypotheses(collection: Collection, item: Item, grey: bool, draw: random.Random) -> list[tuple[str, str]]:
    """Two hypotheses on a picture with their labels; grey: it is shown without colours.

    On the colour: entailment or contradiction, and neutral where the picture does not show colours; on another fact:
    entailment or contradiction. A picture in colours gets two on its colour, one grey gets one of each. With as many of
    the one as of the other, the hypothesis alone gives 37.5 % (a third on colours, half on other facts), the picture
    alone 50 %, and 37.5 % are of the most frequent class.
    """
    name = draw.choice([name for name in collection.facts if name != "color"])
    color = collection.facts["color"]
    if grey:
        label = draw.choice(["entailment", "contradiction"])
        return [
            (color.statement(draw.choice(collection.hues)), "neutral"),
            (_sentence(collection, item, name, label, draw), label),
        ]
    return [(_sentence(collection, item, "color", label, draw), label) for label in ("entailment", "contradiction")]


def _sentence(collection: Collection, item: Item, name: str, label: str, draw: random.Random) -> str:
    """A sentence on a fact, true for entailment and else false."""
    value = item.facts[name]
    if label != "entailment":
        value = other_value(collection, name, value, draw)
    return collection.facts[name].statement(value)


def other_value(collection: Collection, name: str, value: str, draw: random.Random) -> str:
    """A value that the fact does not have here; of colours, only hues."""
    values = collection.hues if name == "color" and value in collection.hues else collection.facts[name].values
    return draw.choice([other for other in values if other != value])


def pair_statements(
    collection: Collection, left: Item, right: Item, name: str, draw: random.Random
) -> list[tuple[str, bool]]:
    """Four statements on two pictures and one of their facts, of which two are true.

    One is true and one false of the same picture, left or right; the other two are on both pictures and contradict each
    other. If the fact has one value in both pictures as often as not, neither the pictures alone nor the statement
    alone give more than half.
    """
    fact, here, there = collection.facts[name], left.facts[name], right.facts[name]
    side = "left" if draw.random() < 0.5 else "right"
    own, opposite = (here, there) if side == "left" else (there, here)
    false = opposite if opposite != own else other_value(collection, name, own, draw)
    same = here == there
    found = [
        (f"in the {side} picture {fact.statement(own)}", True),
        (f"in the {side} picture {fact.statement(false)}", False),
    ]
    if draw.random() < 0.5:
        one = fact.statement(draw.choice([here, there]))
        return [*found, (f"in both pictures {one}", same), (f"in exactly one of the pictures {one}", not same)]
    noun = fact.noun
    return [
        *found,
        (f"the {noun} is the same in the two pictures", same),
        (f"the {noun} is not the same in the two pictures", not same),
    ]
