"""SNLI-VE, NLVR2, CIFAR and GLUE as a user runs them, on shards of the official formats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, matthews_corrcoef

from bt.data.shards import ShardSet
from bt.samples.offline import offline_shards
from tests import test_evaluate
from tests.test_bad_input import one_line
from tests.test_train import run

evaluate = test_evaluate.evaluate  # fixture: bt.evaluate in this process

SMOKE = ["trainer=smoke", "tracking=none", "data=shards", "eval.max_samples=null"]
# By name: the task, its data set, and the splits that are measured.
RUNS = {
    "snli_ve": ["task=snli_ve", "data.val_split=dev"],
    "nlvr2": ["task=nlvr2", "data.val_split=dev", "data.test_split=[dev,test1]"],
    "cifar10": ["task=cifar", "data.val_split=test"],
    "cifar100": ["task=cifar", "data.val_split=test"],
    "glue_cola": ["task=glue", "task.objectives.glue.task=cola", "data.val_split=dev"],
    "glue_stsb": ["task=glue", "task.objectives.glue.task=stsb", "data.val_split=dev"],
    "glue_mnli": [
        "task=glue", "task.objectives.glue.task=mnli", "data.val_split=[dev_matched,dev_mismatched]",
        "data.test_split=[test_matched,test_mismatched]",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, shards) -> Path:
    """A run of MLM and ITM on captions, whose weights the tasks start from."""
    root = tmp_path_factory.mktemp("pretrained")
    data = f"data.dir={offline_shards('coco_karpathy', shards)}"
    done = run("bt.train", "task=pretrain", *SMOKE, data, "eval.test=false", "run_dir=run", cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "run"


def of(name: str, shards: Path, *more: object) -> list[str]:
    return [*RUNS[name], *SMOKE, f"data.dir={offline_shards(name, shards)}", *map(str, more)]


def entries(shards: Path, name: str, *splits: str) -> list[dict]:
    """The labelled entries of some splits, in file order."""
    data = ShardSet(str(offline_shards(name, shards)), list(splits))
    field = next(iter(data.text_fields), None)
    infos = [data.read(number).info for number in range(len(data))]
    return [entry for info in infos for entry in (info[field] if field else [info])]


def predictions(run_dir: Path, split: str = "test") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"predictions-{split}.jsonl").read_text().splitlines()]


def metrics(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "report.json").read_text())["metrics"]


def weights(run_dir: Path, which: str = "last") -> dict:
    return load_file(run_dir / "checkpoints" / which / "model.safetensors")


UNREAD = {
    "cifar100": ("text", "cross", "text_bridge", "type_embeddings"),
    "glue_mnli": ("vision", "cross", "image_pooler"),
}


@pytest.mark.parametrize("name", ["snli_ve", "nlvr2", "cifar100", "glue_mnli"])
def test_a_run_from_pre_trained_weights(command, evaluate, shards, pretrained, tmp_path, name):
    objective = RUNS[name][0].removeprefix("task=")
    rates = ["optimizer.lr=1e-3", "optimizer.warmup=0", "optimizer.decay=cosine"]
    status, error = command(*of(name, shards, *rates, f"init_from={pretrained}", "run_dir=run"))
    assert status == 0, error
    before, after = weights(pretrained), weights(tmp_path / "run")
    # What the task does not read is as it was, and in the checkpoint for the next task; all the rest has learnt.
    unread = [key for key in before if key.split(".")[1] in UNREAD.get(name, ())]
    assert all((before[key] == after[key]).all() for key in unread) and bool(unread) == (name in UNREAD)
    part = "text" if "glue" in name else "vision"
    read = [key for key in before if key.startswith(f"tower.{part}.") and not key.endswith("key.bias")]
    assert sum((before[key] != after[key]).any().item() for key in read) >= 0.9 * len(read)
    assert {key for key in before if key.startswith("tower.")} == {key for key in after if key.startswith("tower.")}
    stored = load_file(tmp_path / "run/checkpoints/last/optimizer.safetensors")
    assert not any(f".tower.{other}." in f".{key}" for key in stored for other in UNREAD.get(name, ()))
    if name == "nlvr2":
        types = before["tower.type_embeddings.weight"], after["tower.type_embeddings.weight"]
        assert [len(rows) for rows in types] == [2, 3] and (types[1][2] != types[1][1]).any()
        assert (types[1][2] - types[0][1]).abs().max() < 1e-2, "the row of second images starts as that of the first"
    # The same figures from the checkpoint again; and the best checkpoint's metrics are those of its predictions.
    found, wanted = evaluate("run_dir=run", "split=val"), metrics(tmp_path / "run")
    assert found.status == 0, found.error
    assert f"heads taken: {objective}" in found.out
    split = {"cifar100": ("test",), "glue_mnli": ("dev_matched", "dev_mismatched")}.get(name, ("dev",))
    known, rows = entries(shards, name, *split), predictions(tmp_path / "run", "val")
    assert [row.get("id") for row in rows] == [entry.get("id") for entry in known] and len(rows) >= 2
    classes = ShardSet(str(offline_shards(name, shards)), "train").labels["classes"]
    assert [row["truth"] for row in rows] == [classes[entry["label"]] for entry in known]
    share = accuracy_score([row["truth"] for row in rows], [row["prediction"] for row in rows])
    if name != "glue_mnli":
        assert wanted[f"{objective}/val/accuracy"] == pytest.approx(share)
        assert found.value == wanted[f"{objective}/val/accuracy"]
    else:
        parts = Counter(row["part"] for row in rows)
        assert parts["matched"] == parts["mismatched"] == len(rows) / 2
        assert found.value == wanted["glue/val/score"] == pytest.approx(share)
    assert "nlvr2/test/consistency" in wanted if name == "nlvr2" else "nlvr2/test/consistency" not in wanted


def test_heads_are_named(command, shards, pretrained, tmp_path, caplog):
    caplog.set_level("INFO")
    assert command(*of("glue_cola", shards, f"init_from={pretrained}", "run_dir=run"))[0] == 0
    assert "new heads: glue; heads in the checkpoint that are not used: itm, mlm" in caplog.text
    # Test splits of GLUE have no labels: predictions, and no figures of them.
    assert not any("/test/" in name for name in metrics(tmp_path / "run"))
    rows = predictions(tmp_path / "run")
    assert [row["id"] for row in rows] == [entry["id"] for entry in entries(shards, "glue_cola", "test")]
    assert {row["prediction"] for row in rows} <= {"unacceptable", "acceptable"}
    assert {row["truth"] for row in rows} == {None}


def test_a_split_without_labels(command, evaluate, shards, tmp_path):
    assert command(*of("glue_stsb", shards, "run_dir=run"))[0] == 0
    done = evaluate("run_dir=run", "split=test")
    assert (done.status, done.value) == (0, None), done.error
    assert "test has no labels: its predictions are in run" in done.out
    rows = predictions(tmp_path / "run")
    assert len(rows) >= 2 and all(type(row["prediction"]) is float and row["truth"] is None for row in rows)
    # A run that is to choose by such a split cannot.
    result = command(*of("glue_stsb", shards, "data.val_split=test", "run_dir=blind"))
    one_line(result, "task.metric=glue/val/score was not measured", "the split has no labels")


def test_a_split_that_is_empty(command, shards):
    folder = offline_shards("snli_ve", shards.parent / "empty")
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["dev"] = {"samples": 0, "texts": {"hypotheses": 0}, "shards": []}
    (folder / "index.json").write_text(json.dumps(index))
    one_line(command(*RUNS["snli_ve"], *SMOKE, f"data.dir={folder}"), "no split 'dev'", "has train, test")


def test_a_head_of_other_classes(command, shards):
    assert command(*of("cifar10", shards, "run_dir=ten"))[0] == 0
    hundred = of("cifar100", shards, "init_from=ten", "run_dir=hundred")
    one_line(command(*hundred), "the head of cifar does not fit: labels 'classes'", "checkpoint.ignore_heads=true")
    assert command(*hundred, "checkpoint.ignore_heads=true")[0] == 0


def test_a_label_that_is_no_class(command, shards):
    folder = offline_shards("cifar10", shards.parent / "fewer")
    index = json.loads((folder / "index.json").read_text())
    index["labels"]["classes"] = index["labels"]["classes"][:2]
    (folder / "index.json").write_text(json.dumps(index))
    result = command(*RUNS["cifar10"], *SMOKE, f"data.dir={folder}")
    one_line(result, "task cifar: label ", "is not the number of a class: allowed are 0 to 1 (")


def test_options_that_are_not(command, shards):
    one_line(command(*of("cifar10", shards, "task.objectives.cifar.head=fixed")), "one of trained, frozen")
    task = ["task=glue", *SMOKE, f"data.dir={offline_shards('glue_cola', shards)}"]
    one_line(command(*task), "task.objectives.glue.task must be given")
    one_line(command(*task, "task.objectives.glue.task=wnli"), "one of cola, sst2, mrpc")
    one_line(
        command(*task, "task.objectives.glue.task=mnli"), "the classes of mnli are entailment, neutral, contradiction"
    )
    one_line(command(*RUNS["nlvr2"], *SMOKE, f"data.dir={offline_shards('snli_ve', shards)}"), "'statements'")


def test_patience_is_that_of_the_tasks_own_metric(command, evaluate, shards, tmp_path):
    """With a rate of next to nothing Matthews' correlation never improves on its first value."""
    more = [
        "data.val_split=train", "optimizer.lr=1e-30", "trainer.max_steps=50", "trainer.epochs=null",
        "eval.every_epochs=null", "eval.every_steps=2", "eval.patience=3", "eval.test=false",
    ]  # fmt: skip
    assert command(*of("glue_cola", shards, *more, "run_dir=run"))[0] == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["best_step"], report["steps"]) == (2, 8)
    found = evaluate("run_dir=run", "split=val")
    assert report["metrics"]["glue/val/score"] == report["metrics"]["glue/val/matthews"] == found.value
    rows, labels = predictions(tmp_path / "run", "val"), [e["label"] for e in entries(shards, "glue_cola", "train")]
    chosen = [int(row["prediction"] == "acceptable") for row in rows]
    assert found.value == pytest.approx(matthews_corrcoef(labels, chosen))


@pytest.mark.parametrize("name", ["nlvr2", "cifar10", "glue_mnli"])
def test_two_ranks_run_as_one(command, shards, tmp_path, name):
    """Losses, figures over the whole split and predictions in its order; uneven shares of eight and of three."""
    same = of(name, shards, "encoder.text.dropout=0", "cross.dropout=0", "optimizer.lr=1e-3", "eval.batch=3")
    if name != "cifar10":
        same.append(f"task.objectives.{RUNS[name][0].removeprefix('task=')}.dropout=0")
    assert command(*same, "run_dir=one")[0] == 0
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "bt.train"]
    done = run("torch.distributed.run", *torchrun, *same, "run_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / folder) for folder in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6) and len(one) >= 3
    journals = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("one", "two")]
    losses = [
        [v for line in lines for k, v in json.loads(line).items() if k.endswith("train/loss")] for lines in journals
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 3
    rows = [
        [(row.get("id"), row.get("image"), row["prediction"]) for row in predictions(tmp_path / f)]
        for f in ("one", "two")
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 3
