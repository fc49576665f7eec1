"""Raw trees of questions: VQAv2 and VGQA."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bt.data.sources.raw import COCO_HOME
from bt.samples.collection import Collection, Item, Question, generator
from bt.samples.trees.captions import put_vg_image, put_vg_images_list
from bt.samples.trees.files import put_jpeg, put_json
from bt.samples.words import questions

_PARTS = {"train": "train2014", "val": "val2014", "test": "test2015"}
_INFO = {"info": {"description": "pictures of packages in the format of VQA v2.0"}, "task_type": "Open-Ended"}


def vqav2(collection: Collection, raw_dir: Path, seed: int) -> None:
    """All questions of a picture; the first half of the test images is test-dev. Question ids as in VQAv2: the image's
    number and three digits."""
    folder = raw_dir / COCO_HOME
    for split, part in _PARTS.items():
        asked = _asked(collection, split, seed)
        for image, item, _ in asked:
            put_jpeg(folder / part / f"COCO_{part}_{image:012d}.jpg", item.image())
        listed = [
            {"image_id": image, "question": question.text, "question_id": 1000 * image + place}
            for image, _, found in asked
            for place, question in enumerate(found)
        ]
        _put_questions(folder, part, listed)
        if split == "test":
            few = {image for image, _, _ in asked[: (len(asked) + 1) // 2]}
            _put_questions(folder, "test-dev2015", [entry for entry in listed if entry["image_id"] in few])
    put_annotations(folder, collection, seed)


def _asked(collection: Collection, split: str, seed: int) -> list[tuple[int, Item, list[Question]]]:
    """Number, picture and questions of a split's pictures."""
    return [
        (number, item, questions(collection, item, generator("questions", seed, item.name)))
        for number, item in enumerate(collection.items, 1)
        if item.split == split
    ]


def _put_questions(folder: Path, part: str, listed: list[dict[str, Any]]) -> None:
    data = {**_INFO, "data_type": "mscoco", "data_subtype": part, "questions": listed}
    put_json(folder / f"vqav2/v2_OpenEnded_mscoco_{part}_questions.json", data)


def put_annotations(folder: Path, collection: Collection, seed: int) -> None:
    """The annotation files of train and val, which make the classes of VQAv2 and VGQA."""
    for split in ("train", "val"):
        annotations = []
        for image, item, found in _asked(collection, split, seed):
            draw = generator("answers", seed, item.name)
            annotations += [_annotation(image, place, question, draw) for place, question in enumerate(found)]
        data = {**_INFO, "data_subtype": _PARTS[split], "annotations": annotations}
        put_json(folder / f"vqav2/v2_mscoco_{_PARTS[split]}_annotations.json", data)


def _annotation(image: int, place: int, question: Question, draw: random.Random) -> dict[str, Any]:
    said = ten_answers(question.answer, draw)
    return {
        "question_type": " ".join(question.text.split()[:2]),
        "multiple_choice_answer": question.answer,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said, 1)],
        "image_id": image,
        "answer_type": question.type,
        "question_id": 1000 * image + place,
    }


def ten_answers(answer: str, draw: random.Random) -> list[str]:
    """What ten people say: the true answer six times or more, in some cases spelt in another way, and up to four times
    that they do not know. Its score is 1 by VQA's rule in any case."""
    unsure = draw.choice([0, 0, 0, 1, 2, 4])
    spelt = draw.choice([0, 0, 1, 2])
    return [answer] * (10 - unsure - spelt) + [f"{answer.capitalize()}."] * spelt + ["cannot tell"] * unsure


def vgqa(collection: Collection, raw_dir: Path, seed: int) -> None:
    """The questions of all images; their answers as a sentence ("Blue."). Images are in Karpathy's splits by their own,
    those of test in VGQA's val. VQAv2's annotations of the same pictures lie beside it."""
    vg = raw_dir / "vg"
    entries = []
    for image, item, found in _by_number(_asked(collection, split, seed) for split in _PARTS):
        put_vg_image(vg, image, item)
        qas = [
            {"qa_id": 1000 * image + k, "image_id": image, "question": q.text, "answer": f"{q.answer.capitalize()}."}
            for k, q in enumerate(found)
        ]
        entries.append({"id": image, "qas": qas})
    put_json(vg / "annotations/question_answers.json", entries)
    put_vg_images_list(vg, collection)
    put_annotations(raw_dir / COCO_HOME, collection, seed)


def _by_number(splits: Iterable[list[tuple[int, Item, list[Question]]]]) -> list[tuple[int, Item, list[Question]]]:
    return sorted((entry for split in splits for entry in split), key=lambda entry: entry[0])
