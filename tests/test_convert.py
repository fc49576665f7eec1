import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from bt.convert import main
from bt.data.shards import ShardSet
from tests.data.helpers import flip_byte, make_raw_tree, truncate


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bt.convert", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def fails(*arguments: str) -> str:
    """The one line on standard error of a command that must fail."""
    done = run(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs `python -m bt.convert ...` in this process; returns status, standard output and the last line of errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bt.convert", *arguments])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        return status, out, err.strip().split("\n")[-1]

    return call


@pytest.fixture(scope="module")
def small_raw(tmp_path_factory):
    return make_raw_tree(tmp_path_factory.mktemp("raw"), 60)


@pytest.fixture(scope="module")
def converted(small_raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "easy"
    return out, run("source=easy_vqa", f"raw_dir={small_raw}", f"out_dir={out}", "shard_size=25")


def test_convert_and_verify(converted, small_raw):
    out, done = converted
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"written to {out}"
    assert lines[1].startswith("  train: 54 samples, ") and ", 3 shards, " in lines[1]
    assert [line.split(":")[0] for line in lines[1:]] == ["  train", "  val", "  test"]
    assert "\r" not in done.stderr and "easy_vqa: 120/120 samples" in done.stderr
    again = run("source=easy_vqa", f"raw_dir={small_raw}", f"out_dir={out}", "shard_size=25")
    assert again.returncode == 0 and again.stdout.startswith(f"already complete: {out}")
    sound = run(f"verify={out}")
    assert sound.returncode == 0 and sound.stdout == f"{out}: all shards and tables are as the index says\n"
    assert "verify: 7/7 shards" in sound.stderr


def test_verify_finds_a_flipped_byte(converted):
    out, _ = converted
    flip_byte(out / "train-000001.tar", 3000)
    flip_byte(out / "val-000000.npy", 150)
    lines = [line for line in fails(f"verify={out}").splitlines() if line and not line.startswith("verify: ")]
    flip_byte(out / "train-000001.tar", 3000)
    flip_byte(out / "val-000000.npy", 150)
    assert lines[0] == f"{out}/train-000001.tar differs from the index (SHA-256)"
    assert "train-000001.tar: the bytes of sample 'train-0000" in lines[1]
    assert lines[2:] == [f"{out}/val-000000.npy differs from the index (SHA-256)", f"error: {out}: 3 faults"]


def test_other_options_are_refused(converted, small_raw, command):
    out, _ = converted
    status, _, line = command("source=easy_vqa", f"raw_dir={small_raw}", f"out_dir={out}")
    assert status == 1 and f"{out} holds another data set (shard_size=25, asked: shard_size=1000)" in line


def test_missing_raw_data(tmp_path):
    line = fails("source=easy_vqa", f"raw_dir={tmp_path}", f"out_dir={tmp_path}/out")
    assert line.count("\n") == 0 and f"missing raw file: {tmp_path}/data/answers.txt" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give either source=NAME"),
        (["source=mnist"], "easy_vqa"),
        (["source=easy_vqa", "source.colour=true"], "source.colour"),
        (["source=easy_vqa", "shard_size=0"], "shard_size"),
        (["source=easy_vqa", "outdir=x"], "outdir"),
        (["verify=/nowhere"], "no data set in /nowhere"),
        (["inspect=/nowhere"], "no data set in /nowhere"),
        (["verify=x", "inspect=x"], "give either source=NAME"),
        (["source=easy_vqa", "images.exif=turn"], "images.exif=turn is not one of: ignore, apply"),
        (["source=easy_vqa", "images.reencode=101"], "images.reencode=101"),
        (["source=easy_vqa", "images.max_side=big"], "images.max_side"),
        (["source=easy_vqa", "captions.min_words=5", "captions.max_words=4"], "captions.min_words=5 is more than"),
        (["source=easy_vqa", "max_bad_share=2"], "max_bad_share=2"),
        (["source=easy_vqa", "on_bad_sample=drop"], "on_bad_sample=drop is not one of: skip, fail"),
    ],
)
def test_mistakes_are_one_line(arguments, says, command):
    status, _, line = command(*arguments)
    assert status == 1 and line.startswith("error: ") and says in line


def test_inspect(converted, tmp_path, command):
    out, done = converted
    lines = command(f"inspect={out}", f"inspect_out={tmp_path}/sheet.png")[1].splitlines()
    assert lines[0] == f"{out}: easy_vqa, 120 samples" and lines[-1] == f"written to {tmp_path}/sheet.png"
    assert lines[1] == done.stdout.splitlines()[1]  # the split, as when it was written
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_options_reach_the_converter(small_raw, tmp_path, command):
    """On one damaged image."""
    raw = shutil.copytree(small_raw, tmp_path / "raw")
    truncate(raw / "data/train/images/1.png", 60)
    arguments = ["source=easy_vqa", f"raw_dir={raw}", "split=train"]
    status, _, line = command(*arguments, f"out_dir={tmp_path}/none", "on_bad_sample=fail")
    assert status == 1 and line.startswith("error: easy_vqa: sample 'train-000001' of train: image cannot be decoded (")
    status, _, line = command(*arguments, f"out_dir={tmp_path}/none", "max_bad_share=0.01")
    assert status == 1 and "1 of 54 samples are bad, more than max_bad_share=0.01" in line
    rules = ["captions.min_words=5", "images.reencode=70", "workers=0"]
    status, out, _ = command(*arguments, f"out_dir={tmp_path}/out", *rules)
    assert status == 0 and "  left out: image cannot be decoded: 1" in out
    data = ShardSet(tmp_path / "out", "train")
    assert {len(text.split()) for text in data.all_texts()} >= {5, 6} and len(data) == 53
    captions = [text for n in range(53) for text in data.read(n).info["captions"]]
    assert min(len(text.split()) for text in captions) == 5
    assert data.read(0).images["image"][:3] == b"\xff\xd8\xff"


def test_interrupted_and_continued(data_dir, tmp_path):
    command = [sys.executable, "-m", "bt.convert", "source=easy_vqa", f"out_dir={tmp_path}", "shard_size=500"]
    first = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has its background jobs ignore the signal, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "train-000000.tar").exists():
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    lines = first.communicate(timeout=60)[1].split("\n")
    assert first.returncode == 130
    assert [line for line in lines if line and not line.startswith("easy_vqa: ")] == ["interrupted"]
    assert not (tmp_path / "index.json").exists() and not list(tmp_path.glob("*.tmp"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"written to {tmp_path}"), done.stderr
    names = sorted(path.name for path in data_dir.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert filecmp.cmpfiles(data_dir, tmp_path, names, shallow=False) == (names, [], [])
