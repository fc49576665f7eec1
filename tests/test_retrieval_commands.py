"""Retrieval as a user runs it: pre-training, zero-shot evaluation, fine-tuning of each kind."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bt.evaluate
import bt.train
from bt.engine.checkpoint import read_tensors

KEYS = {f"{side}_{what}" for side in ("tr", "ir") for what in ("r1", "r5", "r10", "mean")} | {"r_mean", "rsum"}


@pytest.fixture(scope="module")
def commands(tmp_path_factory, few_dir):
    """Runs a command in this process and directory: exit status and what it logs."""
    root = tmp_path_factory.mktemp("retrieval")
    settings = ["data=flickr30k_karpathy", f"data.dir={few_dir}", "trainer=smoke", "tracking=none", "trainer.threads=1"]
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def command(module, *arguments: str) -> int | str | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr(sys, "argv", ["command", *settings, *arguments])
            try:
                module.main()
            except SystemExit as end:
                return end.code
        return 0

    yield SimpleNamespace(
        root=root,
        train=lambda *arguments: command(bt.train, *arguments),
        evaluate=lambda *arguments: command(bt.evaluate, *arguments),
    )
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(scope="module")
def pretrained(commands) -> dict[str, Path]:
    """MLM + ITM, and MLM + ITC + ITM with hard negatives."""
    for task in ("pretrain", "pretrain_itc_hard"):
        assert commands.train(f"task={task}", f"run_dir={task}") == 0
    return {task: commands.root / task for task in ("pretrain", "pretrain_itc_hard")}


def metrics(path: Path, name: str) -> dict[str, float]:
    found = json.loads(path.read_text())["metrics"]
    return {key.split("/")[-1]: value for key, value in found.items() if key.startswith(f"{name}/")}


def test_zero_shot_without_a_rank_head(commands, pretrained, capfd):
    """The rank head starts as the match row of ITM: the recalls are those of ITM's match logit."""
    weights = f"init_from={pretrained['pretrain']}"
    assert commands.evaluate(weights, "task=retrieval_itm", "run_dir=zero") == 0
    assert "heads started: irtr from itm" in capfd.readouterr().out
    found = metrics(commands.root / "zero/evaluation-test.json", "retrieval/test")
    assert found.keys() == KEYS and 0 < found["rsum"] < 6
    by_itm = "task.evaluators.retrieval.ranker=itm"
    assert commands.evaluate(weights, "task=retrieval_itm", "run_dir=by_itm", by_itm) == 0
    assert metrics(commands.root / "by_itm/evaluation-test.json", "retrieval/test") == found
    assert commands.evaluate(weights, "task=retrieval_itm_itc", "run_dir=none") == 1
    assert "has no trained head for itc" in capfd.readouterr().err


def test_zero_shot_by_similarity_and_matching(commands, pretrained):
    weights = f"init_from={pretrained['pretrain_itc_hard']}"
    found = {}
    for k in (1, 3, 1000, None):
        name = f"k{k}"
        options = [f"task.evaluators.retrieval.k_test={'null' if k is None else k}", "eval.batch=5"]
        assert commands.evaluate(weights, "task=retrieval_itm_itc", f"run_dir={name}", *options) == 0
        found[k] = metrics(commands.root / f"{name}/evaluation-test.json", "retrieval/test")
    assert found[1000] == found[None] and found[1] != found[3]
    assert not list(commands.root.glob("k*/.evaluation/*"))


def test_fine_tuning_16_way(commands, pretrained, capfd):
    started = [f"init_from={pretrained['pretrain']}", "optimizer.lr=1e-3"]
    assert commands.train("task=retrieval_itm", "run_dir=irtr", *started) == 0
    assert "heads taken: itm; heads started: irtr from itm" in capfd.readouterr().out
    report = json.loads((commands.root / "irtr/report.json").read_text())["metrics"]
    assert {f"retrieval/test/{key}" for key in KEYS} | {"irtr/val/loss", "irtr/test/accuracy"} <= report.keys()
    assert not any(key.startswith("retrieval/val") for key in report), "not while it trains, as the official recipe"
    state = read_tensors(commands.root / "irtr/checkpoints/last/model.safetensors")
    before = read_tensors(pretrained["pretrain"] / "checkpoints/best/model.safetensors")
    head = "objectives.itm.head.fc.weight"
    assert torch.equal(state[head], before[head]), "the ITM head is frozen"
    assert not torch.equal(state["objectives.irtr.head.weight"], before[head][1:])
    assert not torch.equal(state["tower.text_pooler.dense.weight"], before["tower.text_pooler.dense.weight"])


@pytest.mark.parametrize("task", ["retrieval_itm_itc", "contrastive"])
def test_fine_tuning_by_recall(commands, pretrained, task):
    started = [f"init_from={pretrained['pretrain_itc_hard']}", "trainer.max_steps=2"]
    assert commands.train(f"task={task}", f"run_dir={task}", *started) == 0
    report = json.loads((commands.root / task / "report.json").read_text())["metrics"]
    assert {f"retrieval/{split}/{key}" for key in KEYS for split in ("val", "test")} <= report.keys()
    lines = [json.loads(line) for line in (commands.root / task / "metrics.jsonl").read_text().splitlines()]
    name = "itm" if task == "retrieval_itm_itc" else "contrastive"
    assert 0.1 < lines[0][f"{name}/train/loss"] < 10
