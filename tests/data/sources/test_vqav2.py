import json
from collections import Counter

import numpy as np
import pytest

from bt.data.collate import BatchMaker
from bt.data.plan import PairIndex, TrainPlan
from bt.data.sources.vqav2 import VQAv2
from bt.data.text import train_tokenizer
from bt.data.transforms import make_transform
from bt.errors import ConfigError, DataError
from bt.tasks.vqa import VQATargets
from tests.data.sources.labelled import FOLDER, converted, ten_answers, vqav2_tree, write_json


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return vqav2_tree(tmp_path_factory.mktemp("vqav2"))


@pytest.fixture(scope="module")
def train(tree, tmp_path_factory):
    return converted(VQAv2(str(tree), ["train"]), tmp_path_factory.mktemp("out") / "train", "train")


def raw(tree, name):
    """A raw json file's list."""
    data = json.loads((tree / FOLDER / "vqav2" / f"v2_{name}.json").read_text())
    return data.get("questions") or data["annotations"]


def majors(tree):
    files = [raw(tree, f"mscoco_{part}2014_annotations") for part in ("train", "val")]
    return [entry["multiple_choice_answer"] for entries in files for entry in entries]


def test_classes_are_the_frequent_answers_of_train_and_val(tree):
    said = majors(tree)
    frequent = {answer for answer, number in Counter(said).items() if number >= 9}
    labels = VQAv2(str(tree)).labels()
    assert labels["answers"] == sorted(frequent, key=said.index)
    assert 5 < len(frequent) < len(set(said)) and "zebra" not in frequent
    assert labels["question_types"] == ["yes/no", "number", "other"]
    assert VQAv2(str(tree), min_answer_count=1).labels()["answers"] == sorted(set(said), key=said.index)


def test_questions_scores_and_images(tree, train):
    """By the rule of the ten answers that the raw tree was made by: see `ten_answers`."""
    samples, skipped, data = train
    questions = raw(tree, "OpenEnded_mscoco_train2014_questions")
    annotations = {entry["question_id"]: entry for entry in raw(tree, "mscoco_train2014_annotations")}
    classes = data.labels["answers"]
    assert set(samples) == {f"COCO_train2014_{n:012d}" for n in range(30)}
    found = {}
    for image, (key, sample) in enumerate(samples.items()):
        assert sample.images["image"] == (tree / FOLDER / "train2014" / f"{key}.jpg").read_bytes()
        assert sample.info["image_id"] == image
        found |= {entry["id"]: (image, entry) for entry in sample.info["questions"]}
    kinds = Counter()
    for question in questions:
        annotation = annotations.get(question["question_id"])
        answer = annotation and annotation["multiple_choice_answer"]
        if answer not in classes:
            assert question["question_id"] not in found or annotation["answers"][9]["answer"] == "yes"
            continue
        image, entry = found[question["question_id"]]
        kind = question["question_id"] // 10 % 4
        want = [{answer: 1.0}, {answer: 1.0}, {answer: 0.9, "yes": 0.3}, {answer: 0.9}][kind]
        if kind == 2 and answer == "yes":
            want = {"yes": 1.0}
        assert entry["answers"] == want
        assert image == question["image_id"] and entry["question"] == question["question"]
        assert entry["raw_answers"] == ten_answers(answer, question["question_id"] // 10)
        assert entry["type"] == ("yes/no" if answer in ("yes", "no") else "other")
        kinds[kind] += 1
    assert min(kinds[kind] for kind in range(4)) > 20 and 70 not in found and 80 not in found
    assert skipped["question without annotation"] == 1
    assert sum(skipped.values()) == len(questions) - len(found)


def test_answers_as_they_are_miss_the_classes(tree, train):
    """As in the official tables without `_fix`: "Red." and "a red" are no class, whose names are spelt officially."""
    source = VQAv2(str(tree), ["train"], answers={"normalise": "none"})
    entries = {entry["id"]: entry for sample in source.samples(lambda _: None) for entry in sample.info["questions"]}
    assert source.labels() == VQAv2(str(tree)).labels()
    fixed = {entry["id"]: entry for sample in train[0].values() for entry in sample.info["questions"]}
    assert 0 < len(entries) < len(fixed)
    kind3 = [number for number in fixed if number // 10 % 4 == 3]  # "red!" and twice "the red"
    assert kind3 and not any(number in entries for number in kind3)


def test_questions_without_an_answer_among_the_classes_can_be_kept(tree, train):
    annotations = {entry["question_id"]: entry for entry in raw(tree, "mscoco_train2014_annotations")}
    left_out = Counter()
    source = VQAv2(str(tree), ["train"], keep_unanswerable=True)
    samples = list(source.samples(lambda reason: left_out.update([reason])))
    entries = {entry["id"]: entry for sample in samples for entry in sample.info["questions"]}
    usual = {entry["id"]: entry for sample in train[0].values() for entry in sample.info["questions"]}
    reason = "question without an answer among the classes"
    assert len(entries) == len(usual) + train[1][reason] > len(usual) and reason not in left_out
    assert {number: entries[number] for number in usual} == usual
    for number in entries.keys() - usual.keys():
        said = [answer["answer"] for answer in annotations[number]["answers"]]
        assert entries[number]["answers"] == {} and entries[number]["raw_answers"] == said


def test_test_splits_have_no_answers(tree, tmp_path):
    source = VQAv2(str(tree), ["test", "test-dev"])
    samples = list(source.samples(print))
    assert [sample.key for sample in samples if sample.split == "test-dev"] == [
        f"COCO_test2015_{n:012d}" for n in (0, 1, 2)
    ]
    assert len(samples) == source.count() == 9
    entries = [entry for sample in samples for entry in sample.info["questions"]]
    assert all(entry["answers"] == {} and set(entry) == {"id", "question", "answers"} for entry in entries)
    questions = raw(tree, "OpenEnded_mscoco_test2015_questions") + raw(tree, "OpenEnded_mscoco_test-dev2015_questions")
    assert [(entry["id"], entry["question"]) for entry in entries] == [
        (question["question_id"], question["question"]) for question in questions
    ]


def test_a_batch_holds_the_scores(train):
    samples, _, data = train
    index = PairIndex(data.counts("questions"))
    plan = TrainPlan(index, data.starts, seed=1, global_batch=32)
    maker = BatchMaker(
        data,
        index,
        text_field="questions",
        tokenizer=train_tokenizer(data.all_texts()),
        transform=make_transform("clip", 32),
        seed=1,
        targets={"vqa": VQATargets(data.labels["answers"])},
    )
    batch = maker(plan.cut(0))
    scores = batch.targets["vqa"]["scores"].numpy()
    assert scores.shape == (32, len(data.labels["answers"]))
    for row, entry in zip(scores, batch.entries, strict=True):
        said = Counter(
            answer.lower().strip(".!").removeprefix("a ").removeprefix("the ") for answer in entry["raw_answers"]
        )
        want = [min(3 * said[answer], 10) / 10 for answer in data.labels["answers"]]
        assert np.allclose(row, want, atol=1e-6)


def test_the_folder_itself_may_be_given(tree):
    assert VQAv2(str(tree / FOLDER)).labels() == VQAv2(str(tree)).labels()


def test_damaged_raw_files(tree, tmp_path):
    copy = vqav2_tree(tmp_path)
    folder = copy / FOLDER
    questions = raw(copy, "OpenEnded_mscoco_val2014_questions")
    damaged = [*questions, questions[3], {"image_id": 31}, {"image_id": 31, "question_id": 5, "question": None}]
    write_json(folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": damaged[1:]})
    annotations = raw(copy, "mscoco_val2014_annotations")
    del annotations[5]["answers"]
    write_json(folder / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    skipped = Counter()
    kept = [
        entry
        for sample in VQAv2(str(copy), ["val"]).samples(lambda why: skipped.update([why]))
        for entry in sample.info["questions"]
    ]
    out_of_classes = skipped.pop("question without an answer among the classes")
    assert len(kept) + out_of_classes == len(questions) - 2
    assert skipped == {
        "duplicate question": 1,
        "malformed question": 2,
        "malformed annotation": 1,
        "question without annotation": 1,
        "annotation without question": 1,
    }


def test_missing_and_broken_files(tree, tmp_path):
    copy = vqav2_tree(tmp_path)
    (copy / FOLDER / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    next(VQAv2(str(copy), ["train"]).samples(print))  # a split that is not wanted need not be there
    with pytest.raises(DataError, match="missing raw file: .*v2_OpenEnded_mscoco_val2014_questions.json"):
        next(VQAv2(str(copy)).samples(print))
    path = copy / FOLDER / "vqav2/v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text()[:5000])
    with pytest.raises(DataError, match="v2_mscoco_val2014_annotations.json"):
        VQAv2(str(copy), ["test"]).labels()
    path.unlink()
    with pytest.raises(DataError, match="missing raw file: .*v2_mscoco_val2014_annotations.json"):
        VQAv2(str(copy), ["test"]).labels()


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"normalise": "new"}, "source.answers.normalise=new: allowed are official, fixed, none"),
        ({"normalize": "official"}, "unknown option source.answers.normalize"),
        ("fixed", "source.answers=fixed: give source.answers.normalise"),
    ],
)
def test_wrong_options(answers, says):
    with pytest.raises(ConfigError, match=says):
        VQAv2("x", answers=answers)
