"""docs/extending.md: its files copied out of the page, its commands run as they stand, on fewer samples."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from bt.samples import offline_shards
from tests.test_train import ROOT, journal, run


def blocks(page: Path, folder: Path, names: str, language: str) -> list[list[str]]:
    """Writes the page's files below `names` to a folder; its commands in blocks of a language, without `python -m`."""
    commands = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if kind == language:
            commands += [shlex.split(line)[2:] for line in block.splitlines()]
        elif named := re.match(rf"# ({names}/\S+)\n", block):
            (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named[1]).write_text(block)
    return commands


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A directory with the page's files, whose first lines name them, and its commands without `python -m`."""
    folder = tmp_path_factory.mktemp("extending")
    return folder, blocks(ROOT / "docs/extending.md", folder, "my_project", "sh")


def test_the_pages_task_learns(project, few_dir):
    folder, commands = project
    made = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file())
    assert made == ["my_project/conf/task/question_type.yaml", "my_project/question_type.py"]
    assert [command[0] for command in commands] == ["bt.convert", "bt.train", "bt.evaluate"]
    _, train, evaluate = commands
    done = run(*train, f"data.dir={few_dir}", "tracking=none", "data.workers=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "runs/question_type/report.json").read_text())
    losses = [line["question_type/train/loss"] for line in journal(folder / "runs/question_type") if "lr/base" in line]
    assert report["steps"] == 200 and losses[-1] < losses[0] / 2
    rows = [
        json.loads(line) for line in (folder / "runs/question_type/predictions-test.jsonl").read_text().splitlines()
    ]
    kinds = [row["truth"] for row in rows]
    hits = [row["type"] == row["truth"] for row in rows]
    metrics = report["metrics"]
    assert metrics["question_type/test/accuracy"] == pytest.approx(sum(hits) / len(hits))
    majority = max(map(kinds.count, kinds)) / len(kinds)
    assert majority < 0.9 and metrics["question_type/test/accuracy"] > majority + 0.1
    # Always the same type would have a third of its own F1, that is 0.28.
    assert metrics["question_type/test/macro_f1"] > 0.5
    done = run(*evaluate, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "runs/question_type/evaluation-val.json").read_text())["metrics"]
    assert found == {name: value for name, value in metrics.items() if "/val/" in name} and len(found) == 3


def test_it_goes_with_vqav2_and_beside_pre_training(project, tmp_path):
    """Three more claims of the page: other types, a split without any, and `defaults: [pretrain]`."""
    folder, (_, train, _) = project
    block = (folder / "my_project/conf/task/question_type.yaml").read_text()
    (tmp_path / "conf/task").mkdir(parents=True)
    (tmp_path / "conf/task/all_three.yaml").write_text(f"defaults: [pretrain]\n{block}")
    done = run(
        train[0], "--config-dir", tmp_path / "conf", f"plugins=[{folder / 'my_project'}]", "task=all_three",
        "data=vqav2", f"data.dir={offline_shards('vqav2', tmp_path)}", "trainer=smoke", "tracking=none",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = journal(tmp_path / "run")[0]
    assert {f"{name}/train/loss" for name in ("mlm", "itm", "question_type")} <= first.keys()
    metrics = json.loads((tmp_path / "run/report.json").read_text())["metrics"]
    assert "question_type/val/macro_f1" in metrics and not any("question_type/test" in name for name in metrics)
    rows = [json.loads(line) for line in (tmp_path / "run/predictions-test.jsonl").read_text().splitlines()]
    assert rows and all(row["truth"] is None and row["type"] in ("yes/no", "number", "other") for row in rows)


def test_the_pages_bridge_encoder_and_source(tmp_path, few_dir, command):
    """Red and green pictures in folders become shards, and are told apart by the page's encoder."""
    convert, train, larger = blocks(ROOT / "docs/extending.md", tmp_path, "my_parts", "bash")
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for name, colour in (("red", (200, 20, 20)), ("green", (20, 200, 20))):
            for number in range(count):
                path = tmp_path / "RAW" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (50 + number, 40), colour).save(path)
    done = run(*convert, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "data/mine/index.json").read_text())
    assert index["labels"] == {"classes": ["green", "red"]} and "train: 16 samples" in done.stdout

    quick = ["tracking=none", "data.workers=0"]
    assert command(*train[1:], *quick) == (0, "")
    report = json.loads((tmp_path / "runs/mine/report.json").read_text())
    assert report["metrics"]["cifar/test/accuracy"] == 1.0
    assert "plain_vit.PlainViT" in (tmp_path / "runs/mine/config.yaml").read_text()
    assert command(*larger[1:], *quick, f"data.dir={few_dir}") == (0, "")
    assert "larger.LargerBridge" in (tmp_path / "runs/larger/config.yaml").read_text()


def test_the_readmes_bridge(tmp_path, few_dir, command):
    blocks(ROOT / "README.md", tmp_path, r"my_\w+", "none")
    line = re.search(r"`python -m bt.train (--config-dir my_conf [^`]+)`", (ROOT / "README.md").read_text())[1]
    settings = ["trainer=smoke", "tracking=none", "data.workers=0", f"data.dir={few_dir}", "run_dir=run"]
    assert command(*line.split(), *settings) == (0, "")
    assert "average.AverageBridge" in (tmp_path / "run/config.yaml").read_text()
    losses = [line["vqa/train/loss"] for line in journal(tmp_path / "run") if "vqa/train/loss" in line]
    assert len(losses) == 3 and len(set(losses)) == 3
