import subprocess
import sys

import pytest

from tests.data.helpers import flip_byte, make_raw_tree


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


def test_verify_finds_a_flipped_byte(converted):
    out, _ = converted
    flip_byte(out / "train-000001.tar", 3000)
    flip_byte(out / "val-000000.npy", 150)
    lines = fails(f"verify={out}").splitlines()
    flip_byte(out / "train-000001.tar", 3000)
    flip_byte(out / "val-000000.npy", 150)
    assert lines[0] == f"{out}/train-000001.tar differs from the index (SHA-256)"
    assert "train-000001.tar: the bytes of sample 'train-0000" in lines[1]
    assert lines[2:] == [f"{out}/val-000000.npy differs from the index (SHA-256)", f"error: {out}: 3 faults"]


def test_other_options_are_refused(converted, small_raw):
    out, _ = converted
    line = fails("source=easy_vqa", f"raw_dir={small_raw}", f"out_dir={out}")
    assert line.count("\n") == 0 and f"{out} holds another data set" in line


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
    ],
)
def test_mistakes_are_one_line(arguments, says):
    line = fails(*arguments)
    assert line.count("\n") == 0 and says in line
