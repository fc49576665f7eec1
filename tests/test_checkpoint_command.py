"""`bt.checkpoint` at the command line, from a run to other programs and back into `bt.evaluate` and `bt.train`."""

import json
from pathlib import Path

import pytest
import torch

from bt.checkpoint import main
from bt.engine.initial import load_weights
from bt.errors import CheckpointError
from bt.interop.folder import build
from bt.interop.load import load_model
from tests.interop.models import bundle, released_file
from tests.test_evaluate import SMOKE, VQA, evaluate  # noqa: F401 - a fixture
from tests.test_train import run

# Sizes that every format can hold.
SIZES = [
    "encoder.vision.architecture={width:64,layers:2,patch_size:16,head_width:64,mlp_ratio:4,quick_gelu:true}",
    "encoder.text.config.hidden_size=64",
    "encoder.text.config.num_hidden_layers=2",
    "encoder.text.config.intermediate_size=128",
    "cross.width=64",
    "cross.heads=2",
    "cross.layers=2",
    "cross.ffn_ratio=2",
]
AS_SMOKE = ["eval.max_samples=8", "eval.batch=8", "trainer.threads=1", "data.workers=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_dir) -> Path:
    root = tmp_path_factory.mktemp("exported")
    own = [f"data.dir={few_dir}", f"run_dir={root / 'run'}", "trainer.threads=1"]
    done = run("bt.train", VQA, *SMOKE, *SIZES, *own, cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture(scope="module")
def imported(trained) -> Path:
    """The run as a file of the released code, read back."""
    root, tokenizer = trained.parent, trained / "tokenizer.json"
    main(["export", str(trained), "--format", "official", "--out", str(root / "vqa.ckpt")])
    main(["import", str(root / "vqa.ckpt"), "--out", str(root / "imported"), "--tokenizer", str(tokenizer)])
    return root / "imported"


def test_an_imported_model_is_evaluated_and_trained_on(trained, imported, few_dir, evaluate, capfd):  # noqa: F811
    reported = json.loads((trained / "report.json").read_text())["metrics"]["vqa/test/score"]
    done = evaluate(f"run_dir={imported}", f"data.dir={few_dir}", *AS_SMOKE)
    assert (done.status, done.value) == (0, reported), done.error
    groups = [f"{group}=imported" for group in ("encoder", "bridge", "cross", "task")]
    given = ["--config-dir", str(imported / "conf"), *groups, f"init_from={imported}", f"data.dir={few_dir}"]
    longest = "data.max_text_len=16"
    done = evaluate(*given, longest, *AS_SMOKE)
    assert (done.status, done.value) == (0, reported), done.error
    assert "otherwise than" not in done.out + done.error
    done = evaluate(*given, longest, *AS_SMOKE, "cross.norm_eps=1e-5")
    assert "was trained: cross.norm_eps: 1e-12 -> 1e-05" in done.out + done.error
    steps = ["trainer.max_steps=1", "global_batch=4", "tracking=none", "run_dir=more", "eval.test=false"]
    done = run("bt.train", *given, longest, *AS_SMOKE, *steps, cwd=Path.cwd())
    assert done.returncode == 0 and "heads taken: vqa" in done.stdout + done.stderr, done.stderr
    assert (Path.cwd() / "more/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_exports_of_a_run(trained, imported, capsys, tmp_path):
    """The answers go with the file; transformers cannot hold the head."""
    one, other = load_model(trained), load_model(imported)
    assert one.labels == other.labels and len(one.labels["answers"]) > 2
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[key]), key
    with pytest.raises(SystemExit) as end:
        main(["export", str(trained), "--format", "hf", "--out", str(tmp_path / "hf")])
    assert str(end.value).startswith("error: transformers cannot hold this model: the head vqa")
    capsys.readouterr()
    main(["export", str(trained), "--format", "hf", "--leave-out", "vqa", "--out", str(tmp_path / "hf"), "--check"])
    printed = capsys.readouterr().out
    assert "cross.norm_eps" in printed and "1e-12 here, 1e-05 there" in printed
    assert printed.count("largest difference") == 3
    with pytest.raises(SystemExit, match="^error: --check is for --format hf, .* not for official"):
        main(["export", str(trained), "--format", "official", "--out", str(tmp_path / "a.ckpt"), "--check"])
    with pytest.raises(SystemExit, match="hf exists already: give another --out"):
        main(["export", str(trained), "--format", "hf", "--leave-out", "vqa", "--out", str(tmp_path / "hf")])


def test_the_report_of_an_import(tmp_path, capsys):
    released_file("adaptive", tmp_path / "mt.ckpt")
    given = ["import", str(tmp_path / "mt.ckpt"), "--out", str(tmp_path / "out")]
    main([*given, "--set", "encoder.text.config.num_attention_heads=4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ManagerTower, released code {tmp_path}/mt.ckpt, sha256 ")
    assert any(line.startswith("mapped") and "bridges" in line for line in lines)
    assert any(line.startswith("kept") and "never called" in line for line in lines)
    assert any(f"--config-dir {tmp_path}/out/conf encoder=imported" in line for line in lines)
    with pytest.raises(SystemExit, match="error: .*out exists already"):
        main(given)


def test_a_released_file_as_init_from_says_what_to_do(tmp_path):
    released_file("add", tmp_path / "bt.ckpt")
    with pytest.raises(CheckpointError, match=f"python -m bt.checkpoint import {tmp_path}/bt.ckpt --out DIR"):
        load_weights(tmp_path / "bt.ckpt", build(bundle()))
