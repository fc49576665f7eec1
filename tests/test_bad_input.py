"""What a user may get wrong, at the command line: one clear line each, status 1, and nothing lost."""

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from bt.data.plan import PairIndex, TrainPlan
from bt.data.shards import ShardSet
from bt.data.text import train_tokenizer
from bt.engine import checkpoint
from bt.samples import offline_shards
from tests.data.helpers import flip_byte, truncate

RUN = ["experiment=easy_vqa", "trainer=smoke", "data.workers=0", "tracking=none", "eval.test=false"]


@pytest.fixture
def damaged_dir(tmp_path, few_dir) -> Path:
    """A copy of the shards, the test's own to damage."""
    return Path(shutil.copytree(few_dir, tmp_path / "shards"))


def one_line(result: tuple[int, str], *words: object) -> None:
    status, err = result
    assert status == 1
    lines = [line for line in err.splitlines() if "Warning" not in line and "warnings.warn" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def test_image_size_that_the_patch_does_not_divide(command, few_dir):
    one_line(command(*RUN, f"data.dir={few_dir}", "encoder.vision.image_size=33"), "image_size=33", "32 and 48")


def test_decoding_on_the_device_by_the_exact_route(command, few_dir):
    result = command(*RUN, f"data.dir={few_dir}", "data.decode_on=device")
    one_line(result, "data.decode_on=device needs data.resize=fast and data.decode_draft=false")


def test_batch_that_does_not_divide(command, few_dir):
    result = command(*RUN, f"data.dir={few_dir}", "global_batch=10", "trainer.micro_batch=4")
    one_line(result, "global_batch=10", "8 and 12")


def test_missing_index(command, tmp_path):
    one_line(command(*RUN, f"data.dir={tmp_path}/nothing"), "nothing", "index.json")


def test_missing_shard(command, damaged_dir):
    (damaged_dir / "train-000001.tar").unlink()
    one_line(command(*RUN, f"data.dir={damaged_dir}"), "train-000001.tar")


def test_truncated_shard(command, damaged_dir):
    truncate(damaged_dir / "train-000002.tar", 700)
    one_line(command(*RUN, f"data.dir={damaged_dir}"), "train-000002.tar")


def test_shard_whose_bytes_differ_from_the_index(command, damaged_dir, caplog, monkeypatch):
    for shard in damaged_dir.glob("train-*.tar"):
        flip_byte(shard, 700)  # inside the first sample's json
    long = [*RUN, f"data.dir={damaged_dir}", "data.max_samples=null", "trainer.max_steps=30", "global_batch=32"]
    one_line(command(*long), "differ from the index (CRC-32)", "verify=")
    # Asked to, the run leaves such samples out, says so once, counts them by shard, and ends well.
    monkeypatch.setattr(logging.getLogger("bt"), "handlers", [caplog.handler])
    status, err = command(*long, "data.on_bad_sample=skip", "data.max_bad_share=0.5", "run_dir=left_out")
    assert status == 0, err
    (said,) = [line for line in caplog.messages if "left out" in line]
    assert re.fullmatch(r"left out a bad image of train-00000\d.tar: bytes differ from the index \(the first .*", said)
    counted = json.loads(Path("left_out/report.json").read_text())["left_out"]
    steps, data = 30, ShardSet(damaged_dir, "train")
    plan = TrainPlan(
        PairIndex(data.counts("questions")), data.starts, seed=0, global_batch=32, texts_per_image=4
    )  # as the experiment has it
    read = [set(plan.index.sample_of(plan.cut(step).pairs).tolist()) for step in range(steps)]
    bad = {
        start: f"{shard.stem}.tar: bytes differ from the index"
        for start, shard in zip(data.starts.tolist(), sorted(damaged_dir.glob("train-*.tar")), strict=False)
    }
    assert counted["train"] == Counter(bad[sample] for batch in read for sample in batch if sample in bad)
    # Above the allowed share it stops.
    result = command(*long, "data.on_bad_sample=skip", "data.max_bad_share=0.001")
    one_line(result, "data.max_bad_share=0.001", "bytes differ from the index")


def test_checkpoint_of_another_architecture(command, few_dir, tmp_path):
    assert command(*RUN, f"data.dir={few_dir}", "run_dir=narrow")[0] == 0
    result = command(*RUN, f"data.dir={few_dir}", "init_from=narrow", "cross.width=64")
    one_line(result, "another architecture", "tower.text_projection.weight: has (32, 32), needs (64, 32)")


def test_head_of_another_size(command, few_dir):
    assert command(*RUN, f"data.dir={few_dir}", "run_dir=first")[0] == 0
    wider = [*RUN, f"data.dir={few_dir}", "init_from=first", "task.objectives.vqa.hidden_scale=3", "run_dir=second"]
    one_line(command(*wider), "objectives.vqa.head.0.weight", "checkpoint.ignore_heads=true")
    assert command(*wider, "checkpoint.ignore_heads=true")[0] == 0


def test_head_of_other_answers(command, few_dir, tmp_path):
    assert command(*RUN, f"data.dir={few_dir}", "run_dir=first")[0] == 0
    others = ["task=vqa", *RUN[1:], f"data.dir={offline_shards('vqav2', tmp_path)}", "init_from=first"]
    one_line(command(*others, "run_dir=second"), "the head of vqa does not fit: labels 'answers': number 0 is")
    assert command(*others, "run_dir=second", "checkpoint.ignore_heads=true")[0] == 0


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_never_executed(command, few_dir, tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "executed")}, tmp_path / "evil.ckpt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    # The tokenizer is looked for first; the check here is of the weights.
    train_tokenizer(ShardSet(few_dir, "train").all_texts()).save(tmp_path / "tokenizer.json")
    for name in ("evil.ckpt", "raw.bin"):
        result = command(*RUN, f"data.dir={few_dir}", f"init_from={tmp_path / name}")
        one_line(result, name)
    assert not (tmp_path / "executed").exists()


def test_run_dir_that_cannot_be_written(command, few_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    one_line(command(*RUN, f"data.dir={few_dir}", "run_dir=file/run"), "run_dir=file/run", "cannot be written")


@pytest.mark.parametrize("evaluations", ["eval.every_epochs=null", "eval.every_steps=1"])
def test_loss_that_becomes_nan(command, few_dir, tmp_path, evaluations):
    result = command(
        *RUN, f"data.dir={few_dir}", "run_dir=run", "optimizer.lr=1e38", "optimizer.warmup=2", "trainer.max_steps=9",
        "trainer.grad_clip=null", "checkpoint.every_steps=1", evaluations,
    )  # fmt: skip
    good = checkpoint.last_checkpoint(tmp_path / "run")
    one_line(result, "not finite", "step", "; images: train-", f"last good checkpoint: run/checkpoints/{good.name}")
    assert all(value.isfinite().all() for value in checkpoint.read_tensors(good / "model.safetensors").values())


def test_loss_that_is_nan(command, few_dir):
    """Two workers, and nothing that looks at the weights before the next loss does."""
    result = command(
        *RUN, f"data.dir={few_dir}", "run_dir=run", "optimizer.lr=1e38", "optimizer.warmup=1", "trainer.max_steps=9",
        "trainer.grad_clip=null", "data.workers=2",
    )  # fmt: skip
    one_line(result, "the loss of vqa is not finite at step 3; images: train-", "checkpoint: none was saved yet")


def test_unknown_transform_leaves_no_run_directory(command, few_dir, tmp_path):
    wrong = [*RUN, f"data.dir={few_dir}", "run_dir=run"]
    one_line(command(*wrong, "data.train_transform=crop"), "data.train_transform", "'crop'", "clip, clip_randaug")
    one_line(command(*wrong, "task.objectives.vqa.weight=-1"), "task.objectives.vqa: VQA.weight=-1: must be at least 0")
    assert not (tmp_path / "run").exists()
    assert command(*wrong)[0] == 0


def test_metric_that_no_objective_measures(command, few_dir):
    one_line(command(*RUN, f"data.dir={few_dir}", "task.metric=itm/val/accuracy"), "task.metric", "vqa/val/...")


def test_missing_test_split_is_found_before_the_first_step(command, few_dir, tmp_path):
    result = command(*RUN[:-1], f"data.dir={few_dir}", "data.test_split=nope", "run_dir=run")
    one_line(result, "no split 'nope'", "train, val, test")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk_while_saving(command, few_dir, tmp_path):
    """The run ends with one line, and goes on from the previous checkpoint once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    settings = [*RUN, f"data.dir={few_dir}", f"run_dir={disk}/run", "checkpoint.every_steps=1", "trainer.max_steps=4"]
    try:
        one_line(command(*settings), "cannot be saved", "No space left", "step-00000001 is kept")
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert command(*settings)[0] == 0
        assert checkpoint.read_state(checkpoint.last_checkpoint(disk / "run"))["step"] == 4
    finally:
        subprocess.run(["umount", disk], check=True)
