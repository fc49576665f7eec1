"""VQA on shards of VQAv2's format as a user runs it: official accuracy on val, submissions for the test splits."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from bt.data.shards import ShardSet
from bt.samples import offline_shards
from tests.test_train import FAST, run

METRICS = ("loss", "accuracy", "accuracy_number", "accuracy_other", "accuracy_yes_no", "score")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return offline_shards("vqav2", tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Path:
    root = tmp_path_factory.mktemp("vqa")
    options = ["data=vqav2", f"data.dir={shards}", *FAST, "trainer.max_steps=12", "optimizer.lr=1e-2"]
    done = run("bt.train", "task=vqa", *options, "run_dir=run", cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "run"


def entries(shards: Path, split: str) -> dict[int, dict]:
    data = ShardSet(str(shards), split)
    return {entry["id"]: entry for number in range(len(data)) for entry in data.read(number).info["questions"]}


def test_a_test_split_without_answers_gives_the_submission_at_the_end_of_a_run(trained, shards):
    """And no metric of it: the report has those of val alone."""
    asked = entries(shards, "test-dev")
    listed = json.loads((trained / "vqa-submission-test.json").read_text())
    assert [set(entry) for entry in listed] == [{"question_id", "answer"}] * len(asked)
    assert [entry["question_id"] for entry in listed] == list(asked)
    classes = ShardSet(str(shards), "train").labels["answers"]
    assert {type(entry["question_id"]) for entry in listed} == {int}
    assert all(entry["answer"] in classes for entry in listed)
    rows = [json.loads(line) for line in (trained / "predictions-test.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [entry["answer"] for entry in listed]
    assert {(row["truth"], row["score"]) for row in rows} == {(None, None)}
    metrics = json.loads((trained / "report.json").read_text())["metrics"]
    assert {f"vqa/val/{name}" for name in METRICS} < metrics.keys()
    assert not any("/test/" in name for name in metrics)


def test_two_ranks_submit_every_question_once(trained, shards):
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "bt.evaluate"]
    done = run("torch.distributed.run", *torchrun, "run_dir=run", "split=test-dev", cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    assert "test-dev has no labels: its predictions are in run" in done.stdout
    submission = json.loads((trained / "vqa-submission-test-dev.json").read_text())
    assert submission == json.loads((trained / "vqa-submission-test.json").read_text())
    assert len(submission) % 16, "the ranks have unequal shares"


def test_the_whole_test_set_is_a_matter_of_one_option(trained, shards):
    done = run("bt.evaluate", "run_dir=run", "data.test_split=test", cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    (path,) = trained.glob("evaluations/*/vqa-submission-test.json")
    assert [entry["question_id"] for entry in json.loads(path.read_text())] == list(entries(shards, "test"))


def test_the_official_accuracy_of_val(trained, shards):
    """The samples' ten annotators agree on the true answer at least six times, in three spellings that the official
    evaluation takes for one, and else say what is no class: so an answer's accuracy is 1 or 0."""
    done = run("bt.evaluate", "run_dir=run", "split=val", cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((trained / "evaluation-val.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (trained / "predictions-val.jsonl").read_text().splitlines()]
    asked, right = entries(shards, "val"), defaultdict(list)
    spellings = set()
    for row in rows:
        entry = asked[row["question_id"]]
        truth = entry["raw_answers"][0]
        spellings |= set(entry["raw_answers"]) - {truth, "cannot tell"}
        assert row["accuracy"] == (row["answer"] == truth), row
        right[entry["type"].replace("/", "_")].append(row["answer"] == truth)
    assert len(rows) == len(asked) and {"No."} < spellings
    for kind, hits in right.items():
        assert metrics[f"vqa/val/accuracy_{kind}"] == pytest.approx(sum(hits) / len(hits))
    hits = sum(right.values(), [])
    assert metrics["vqa/val/accuracy"] == pytest.approx(sum(hits) / len(hits)) and 0 < sum(hits) < len(hits)
    assert right.keys() == {"yes_no", "number", "other"}
