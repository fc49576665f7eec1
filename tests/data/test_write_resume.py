"""Conversions that are broken off, in every way that leaves no time to tidy up, and go on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import pytest

from bt.data.journal import Journal
from bt.data.sources.base import RawSample, Source
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.write import convert
from bt.errors import DataError
from tests.data.helpers import truncate
from tests.data.test_write import digests

STEPS = ("train", "val", "train")
DAMAGED = ("18", "23", "42")  # the first comes twice


@dataclass
class Mixed(Source):
    """The images of a folder by name: two of three are `train`, every tenth sample comes twice."""

    splits = ("train", "val")

    def __post_init__(self):
        super().__post_init__()
        self.name, self.text_fields = "mixed", {"captions": None}

    def samples(self, skip):
        for number, path in enumerate(sorted(Path(self.raw_dir).iterdir())):
            if number % 7 == 0:
                skip("seventh")
            for _ in range(1 + (number % 10 == 0)):
                texts = [f"image {path.stem}", f"image {path.stem}", "an image"]
                yield RawSample(STEPS[number % 3], path.stem, {"": path}, {"captions": texts})


def converted_until(folder: str, out: str, stop: int, workers: int) -> None:
    """Convert until so many samples are enumerated, then be killed; the process ids of the workers are printed."""

    def killed(samples):
        for number, sample in enumerate(samples):
            if number == stop:
                print(json.dumps([child.pid for child in active_children()]), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample

    convert(Mixed(folder), Path(out), 4, killed, workers=workers)


def in_process(call: str, **options) -> subprocess.CompletedProcess:
    code = f"from tests.data.test_write_resume import *\n{call}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def folder(small_raw, tmp_path) -> Path:
    """60 images, the test's own; three are damaged."""
    shutil.copytree(small_raw / "data/train/images", tmp_path / "images")
    for number in DAMAGED:
        truncate(tmp_path / f"images/{number}.png", 50)
    return tmp_path / "images"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_bytes_do_not_depend_on_the_workers(workers, folder, tmp_path):
    index, _ = convert(Mixed(str(folder)), tmp_path / "one", 4)
    convert(Mixed(str(folder)), tmp_path / "more", 4, workers=workers)
    assert digests(tmp_path / "more") == digests(tmp_path / "one")
    stems = sorted(path.stem for path in folder.iterdir())
    good = [stem not in DAMAGED for stem in stems]
    assert index.samples("val") == sum(good[1::3]) and index.samples("train") == sum(good[::3]) + sum(good[2::3])
    assert index.skipped == {
        "duplicate key": sum(good[::10]),
        "duplicate text (captions)": 60 + 6,
        "image cannot be decoded": len(DAMAGED) + 6 - sum(good[::10]),
        "seventh": 9,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again(workers, folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Mixed(str(folder)), whole, 4)
    done = in_process(f"converted_until({str(folder)!r}, {str(out)!r}, 62, {workers})")
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 10
    while any(map(is_running, json.loads(done.stdout))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, json.loads(done.stdout)))
    assert len(json.loads(done.stdout)) == workers
    finished = {path.name for path in out.glob("*.tar")}
    assert {"train-000000.tar", "train-000001.tar", "val-000000.tar"} <= finished
    assert not (out / "index.json").exists()
    notes = [json.loads(line) for line in (out / "index.json.partial").read_text().splitlines()[1:]]
    assert {note["shard"]["name"] for note in notes} == finished
    taken = {note["split"]: note["taken"] for note in notes}
    # Images behind which all of a finished shard lies are not read again: they may be gone.
    last = {}
    places = dict.fromkeys(taken, 0)
    for raw in Mixed(str(folder)).samples(lambda reason: None):
        places[raw.split] += 1
        last[raw.images[""]] = (raw.split, places[raw.split])
    gone = [path for path, (split, place) in last.items() if place <= taken[split]]
    assert len(gone) >= 4 * len(finished)
    for path in gone:
        path.write_bytes(b"")  # it still stands in the list
    convert(Mixed(str(folder)), out, 4, workers=workers)
    assert digests(out) == digests(whole)


def test_an_interrupted_conversion_leaves_whole_shards_alone(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Mixed(str(folder)), whole, 4)

    def interrupted(samples):
        for number, sample in enumerate(samples):
            if number == 50:
                raise KeyboardInterrupt
            yield sample

    for workers in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            convert(Mixed(str(folder)), out, 4, interrupted, workers=workers)
        assert active_children() == [] and not list(out.glob("*.tmp"))
        assert len(list(out.glob("*.tar"))) > 2
    convert(Mixed(str(folder)), out, 4)
    assert digests(out) == digests(whole)


def test_interrupted_between_a_shard_and_its_note(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Mixed(str(folder)), whole, 4)

    def interrupted(self, finished):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(Mixed(str(folder)), out, 4)
    assert {path.name for path in out.glob("*.tar")} == {"train-000000.tar"}
    convert(Mixed(str(folder)), out, 4)
    assert digests(out) == digests(whole)


def test_killed_workers_are_one_line(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Mixed(str(folder)), whole, 4)

    def with_murder(samples):
        for number, sample in enumerate(samples):
            if number == 0:  # most chunks wait still; with a worker left, it could do them before the loss is noticed
                for child in active_children():
                    os.kill(child.pid, signal.SIGKILL)
            yield sample

    with pytest.raises(DataError, match="a process that reads images was killed.*give the command again") as caught:
        convert(Mixed(str(folder)), out, 4, with_murder, workers=2)
    assert "\n" not in str(caught.value) and active_children() == []
    convert(Mixed(str(folder)), out, 4, workers=2)
    assert digests(out) == digests(whole)


def stop_at(number: int):
    def progress(samples):
        for n, sample in enumerate(samples):
            if n == number:
                raise KeyboardInterrupt
            yield sample

    return progress


@pytest.mark.parametrize("damage", ["cut journal", "no shard", "short table", "no journal entry"])
def test_a_record_that_does_not_fit_the_shards(damage, folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Mixed(str(folder)), whole, 4)
    with pytest.raises(KeyboardInterrupt):
        convert(Mixed(str(folder)), out, 4, stop_at(60))
    journal = out / "index.json.partial"
    if damage == "cut journal":
        truncate(journal, 30)
    elif damage == "no shard":
        (out / "val-000001.tar").unlink()
    elif damage == "short table":
        truncate(out / "train-000001.npy", 8)
    else:  # killed between the renaming of a shard and the note of it
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    convert(Mixed(str(folder)), out, 4)
    assert digests(out) == digests(whole)


def test_what_was_stopped_before_its_first_shard_claims_nothing(folder, tmp_path):
    out = tmp_path / "out"
    done = in_process(f"converted_until({str(folder)!r}, {str(out)!r}, 3, 0)")
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in out.iterdir()} == {"index.json.partial", "train-000000.tar.tmp", "val-000000.tar.tmp"}
    convert(Mixed(str(folder), ["val"]), out, 3)
    assert not list(out.glob("*.tmp")) and (out / "val-000000.tar").exists()


def test_two_conversions_at_once(folder, tmp_path):
    code = "from bt.data.journal import *\nfrom pathlib import Path\nimport sys\n"
    code += "journal = Journal(Path(sys.argv[1]), {'source': 'x', 'options': {}}); print(flush=True); input()"
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="another process is writing to .*/out"):
            convert(Mixed(str(folder)), tmp_path / "out", 4)
        other.communicate(b"\n")
    convert(Mixed(str(folder)), tmp_path / "out", 4)


def test_a_full_disk_leaves_whole_shards_alone(small_raw, small_dir, tmp_path):
    """A limit on the size of a file stands for the disk: the second conversion has larger shards."""
    convert(EasyVQA(str(small_raw)), tmp_path / "large", 1000)
    size = (tmp_path / "large/train-000000.tar").stat().st_size
    call = f"convert(EasyVQA({str(small_raw)!r}), Path({str(tmp_path / 'out')!r}), 30)"
    done = in_process(
        call, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, resource.RLIM_INFINITY))
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("bt.errors.DataError: cannot write to") and "File too large" in last, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    convert(EasyVQA(str(small_raw)), tmp_path / "out", 10)
    assert digests(tmp_path / "out") == digests(small_dir)


def test_no_folder_can_be_made(small_raw):
    with pytest.raises(DataError, match="cannot write to /proc/shards: ") as caught:
        convert(EasyVQA(str(small_raw)), Path("/proc/shards"))
    assert "\n" not in str(caught.value)


def test_the_journal_names_what_differs(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(Mixed(str(folder)), tmp_path / "out", 4, stop_at(40))
    with pytest.raises(DataError, match=r"holds an unfinished data set \(split=null, asked: split=\[\"val\"\]\)"):
        convert(Mixed(str(folder), ["val"]), tmp_path / "out", 4)
    journal = Journal(tmp_path / "out", json.loads((tmp_path / "out/index.json.partial").read_text().splitlines()[0]))
    assert sorted(entry.shard.name for entry in journal.finished)[:2] == ["train-000000.tar", "train-000001.tar"]
    journal.close(False)
