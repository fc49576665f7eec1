"""Raw trees of the labelled data sets in their official formats, from easy-VQA's images and questions."""

import json
from pathlib import Path

from PIL import Image

from bt.data.shards import Sample, ShardSet
from bt.data.write import convert
from tests.data.helpers import RAW

FOLDER = "mscoco_flickr30k_vqav2_snli_ve"


def picture(number: int, part: str = "train") -> Image.Image:
    """An image of easy-VQA, RGB, 64 x 64."""
    return Image.open(RAW / part / "images" / f"{number}.png").convert("RGB")


def save(path: Path, number: int, part: str = "train") -> Path:
    """An image of easy-VQA as the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, part).save(path, quality=90)
    return path


def questions_of(part: str, images: range) -> list[tuple[int, str, str]]:
    """Image number, question and answer of easy-VQA, in the order of its file."""
    return [
        (i, question, answer)
        for question, answer, i in json.loads((RAW / part / "questions.json").read_text())
        if i in images
    ]


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_lines(path: Path, lines) -> Path:
    """Lines are text, bytes, or objects for a line of json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def converted(source, out: Path, split: str) -> tuple[dict[str, Sample], dict[str, int], ShardSet]:
    """Samples of a split by key, what was left out by reason, and the opened shards."""
    index, _ = convert(source, out, shard_size=7)
    data = ShardSet(out, split)
    samples = [data.read(number) for number in range(len(data))]
    return {sample.key: sample for sample in samples}, index.skipped, data


def ten_answers(answer: str, number: int) -> list[str]:
    """What ten people may have said, in various spellings: the answer three times or more."""
    return [
        [answer] * 10,
        [answer] * 5 + [answer.title() + "."] * 3 + ["a " + answer, "don't know"],
        ["cannot tell"] * 6 + [answer] * 2 + [answer.upper(), "yes"],
        ["It's unclear"] * 7 + [answer + "!"] + ["the " + answer] * 2,
    ][number % 4]


def vqav2_tree(root: Path) -> Path:
    """30 images of train, 10 of val, 6 of test of which 3 are test-dev. Question id: 10 times its place in easy-VQA's
    part, plus 1 in val and 2 in test. Odd ones out: question 70 is answered by nobody but a zebra, 80 is not
    annotated."""
    folder = root / FOLDER
    parts = {
        "train2014": ("train", range(30), 0),
        "val2014": ("train", range(30, 40), 1),
        "test2015": ("test", range(6), 2),
    }
    for name, (part, images, last) in parts.items():
        for image in images:
            save(folder / name / f"COCO_{name}_{image:012d}.jpg", image, part)
        asked = questions_of(part, images)
        questions = [{"image_id": i, "question": q, "question_id": 10 * n + last} for n, (i, q, _) in enumerate(asked)]
        write_json(folder / f"vqav2/v2_OpenEnded_mscoco_{name}_questions.json", {"questions": questions})
        if part == "test":
            few = [question for question in questions if question["image_id"] < 3]
            write_json(folder / "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": few})
            continue
        annotations = []
        for question, (_, _, answer) in zip(questions, asked, strict=True):
            if question["question_id"] == 80:
                continue
            said = ten_answers(answer, question["question_id"] // 10)
            if question["question_id"] == 70:
                answer, said = "zebra", ["zebra"] * 10
            annotations.append(
                {
                    "image_id": question["image_id"],
                    "question_id": question["question_id"],
                    "question_type": " ".join(question["question"].split()[:2]),
                    "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(said)
                    ],
                }
            )
        write_json(folder / f"vqav2/v2_mscoco_{name}_annotations.json", {"annotations": annotations})
    return root


def vgqa_tree(root: Path) -> Path:
    """Beside `vqav2_tree`: Visual Genome's images 1000 to 1019, of which the even ones are in VG_100K_2. COCO ids: of
    Karpathy's train for 1000-1009, val for 1010 and 1011, test for 1012 and 1013, of none for 1014, and no id for the
    rest. Odd ones out: 1003 has a question twice with two answers, 1004 twice with one, 1005 one without a known
    answer, 1006 none at all, and 1099 is not in image_data.json."""
    vg = root / "vg"
    cocos = {n: 7 * n for n in range(1000, 1015)}
    images = [{"image_id": n, "coco_id": cocos.get(n), "url": f"https://x/VG_100K/{n}.jpg"} for n in range(1000, 1020)]
    write_json(vg / "image_data.json", images)
    for name, ids in {"train": range(1000, 1010), "val": range(1010, 1012), "test": range(1012, 1014)}.items():
        lines = [f"{name}2014/COCO_{name}2014_{cocos[n]:012d}.jpg {cocos[n]}" for n in ids]
        write_lines(vg / f"coco_splits/karpathy_{name}_images.txt", lines)
    for n in range(1000, 1020):
        save(vg / "images" / ("VG_100K" if n % 2 else "VG_100K_2") / f"{n}.jpg", n - 1000)
    entries = []
    for n in [*range(1019, 999, -1), 1099]:
        asked = [(q, a.title() + ".") for i, q, a in questions_of("train", range(n - 1000, n - 999))]
        asked += {
            1003: [("What is it?", "Red"), ("What is it?", "circle")],
            1004: [("What is it?", "A circle"), ("What is it?", "circle."), ("What is it?", "no idea")],
            1005: [("Who is it?", "Ann")],
        }.get(n, [])
        asked = [] if n == 1006 else asked or [("Is it red?", "Yes.")]
        qas = [{"qa_id": 100 * n + k, "image_id": n, "question": q, "answer": a} for k, (q, a) in enumerate(asked)]
        entries.append({"id": n, "qas": qas})
    write_json(vg / "annotations/question_answers.json", entries)
    return root


def nlvr2_tree(root: Path) -> Path:
    """Pairs of neighbouring images n and n + 1 with two statements each: train-<n>-0 for n = 0, 2, ... 18 in the
    directories 0 to 4, dev-<n>-0 and test1-<n>-0 for n = 0, 2, 4; balanced and unbalanced dev hold one pair each. A
    statement is an easy-VQA question of the left image answered by yes or no."""
    nlvr = root / "nlvr"

    def lines(split: str, numbers) -> list[dict]:
        found = []
        for n in numbers:
            asked = [(q, a) for i, q, a in questions_of("train", range(n, n + 1)) if a in ("yes", "no")][:2]
            for k, (question, answer) in enumerate(asked):
                line = {"identifier": f"{split}-{n}-0-{k}", "sentence": question, "label": str(answer == "yes")}
                found.append(line | ({"directory": n // 4} if split == "train" else {}))
        return found

    for split, numbers in {"train": range(0, 20, 2), "dev": range(0, 6, 2), "test1": range(0, 6, 2)}.items():
        write_lines(nlvr / f"nlvr2/data/{split}.json", lines(split, numbers))
        for n in numbers:
            folder = nlvr / (f"images/train/{n // 4}" if split == "train" else split)
            for side in (0, 1):
                save(folder / f"{split}-{n}-0-img{side}.png", n + side)
    write_lines(nlvr / "nlvr2/data/balanced/balanced_dev.json", lines("dev", [2]))
    write_lines(nlvr / "nlvr2/data/unbalanced/unbalanced_dev.json", lines("dev", [4]))
    return root


LABELS = ("contradiction", "neutral", "entailment")


def snli_ve_tree(root: Path) -> Path:
    """12 images of train, 3 each of dev and test, with easy-VQA's questions as hypotheses; the third line of each file
    has no gold label."""
    folder = root / FOLDER
    for split, images in {"train": range(12), "dev": range(12, 15), "test": range(15, 18)}.items():
        lines = []
        for n, (image, question, answer) in enumerate(questions_of("train", images)):
            lines.append(
                {
                    "Flickr30K_ID": f"{1000 + image}",
                    "captionID": f"{1000 + image}.jpg#0",
                    "pairID": f"{1000 + image}.jpg#0r{n}",
                    "gold_label": "-" if n == 2 else LABELS[n % 3],
                    "sentence1": f"the answer is {answer}",
                    "sentence2": f" {question}\n",
                }
            )
        write_lines(folder / f"snli_ve/snli_ve_{split}.jsonl", lines)
        for image in images:
            save(folder / f"flickr30k-images/{1000 + image}.jpg", image)
    return root
