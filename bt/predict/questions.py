"""What can be asked of pairs, and how an answer is written in JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from bt.errors import DataError
from bt.inference.inputs import Picture
from bt.inference.predictor import MASKS, Choice, MatchKind, Predictor
from bt.predict.rows import Row

Results = list[dict[str, Any]]
Asked = Callable[[Sequence[Row]], Results]


def ask(
    model: Predictor, task: str, *, top: int = 5, by: MatchKind | None = None, pool: Executor | None = None
) -> Asked:
    """The function from rows to one JSON object for each.

    task: a name of Predictor.abilities. top: answers or words for each. by: how to match, see Predictor.match. pool:
    threads that read pictures.
    """
    kinds: dict[str, Callable[[list[Picture], list[str], Sequence[Row]], Results]] = {
        "answer": lambda images, texts, _: [
            {"answers": _listed(found, "answer")} for found in model.answer(images, texts, top)
        ],
        "match": lambda images, texts, _: [
            {"score": score, "by": by or model.match_kinds[0]} for score in model.match(images, texts, by)
        ],
        "fill_mask": lambda images, texts, _: [
            {"masks": [_listed(words, "word") for words in found]} for found in model.fill_mask(images, texts, top)
        ],
        "entails": lambda images, texts, _: [
            {"labels": _listed(found, "label")} for found in model.entails(images, texts)
        ],
        "compare": lambda images, texts, rows: [
            {"labels": _listed(found, "label")} for found in model.compare(images, _seconds(model, rows, pool), texts)
        ],
    }
    answer = kinds[task]
    return lambda rows: answer(_pixels(model, [row.image for row in rows], pool), [row.text for row in rows], rows)


def guess_task(model: Predictor, text: str | None) -> str:
    """What is meant where nothing is said: what the model was made for; of a text with a mask, its words."""
    masked = text is not None and any(mask in text for mask in (*MASKS, model.mask_token))
    if masked and "fill_mask" in model.abilities:
        return "fill_mask"
    order = ("answer", "entails", "compare", "match", "fill_mask")
    found = [task for task in order if task in model.abilities]
    if not found:
        raise DataError(f"{model.source} has no head for pictures and texts")
    return found[0]


def _listed(choices: list[Choice], kind: str) -> Results:
    return [{kind: choice.name, "probability": choice.probability} for choice in choices]


def _seconds(model: Predictor, rows: Sequence[Row], pool: Executor | None) -> list[Picture]:
    if any(row.second is None for row in rows):
        raise DataError("a statement on two pictures needs a second one (image2)")
    return _pixels(model, [row.second for row in rows], pool)


def _pixels(model: Predictor, pictures: list[Picture], pool: Executor | None) -> list[Picture]:
    """Each different picture read once; equal ones are one object, which the model encodes once."""
    keys = [picture if not isinstance(picture, bytes) else id(picture) for picture in pictures]
    unique = dict(zip(keys, pictures, strict=True))
    read = pool.map if pool else map
    pixels = dict(zip(unique, read(model.preprocess, unique.values()), strict=True))
    return [pixels[key] for key in keys]
