import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bt.data.shards import ShardSet
from bt.data.write import convert
from bt.errors import DataError
from bt.samples import __main__ as command
from bt.samples.icons import _COLORS, FACTS, drawings, icons
from bt.samples.offline import source_of
from bt.samples.packages import fetch
from bt.samples.trees import write_tree
from bt.samples.words import captions
from tests.test_train import run


@pytest.fixture(scope="module")
def collection():
    if shutil.which("npm") is None:
        pytest.skip("npm, which fetches the icons, is not installed")
    try:
        return icons(300)
    except DataError as error:
        pytest.skip(f"the icons cannot be fetched: {error}")


def test_pictures_show_what_is_said_of_them(collection):
    """Ground, row and number of copies, told from the pixels."""
    rows = FACTS["height"].values
    for item in collection.items:
        pixels = np.asarray(item.image()).astype(int)
        assert pixels.shape == (96, 96, 3)
        ground = np.array(_COLORS[item.facts["color"]])
        for row, part in zip(rows, np.split(pixels, 3), strict=True):
            drawn = (part != ground).any(2)
            assert drawn.any() == (row == item.facts["height"]), item.name
            if drawn.any():
                columns = drawn.any(0)
                copies, width = int(item.facts["number"]), 32 * int(item.facts["number"])
                left = (96 - width) // 2
                assert not columns[:left].any() and not columns[left + width :].any()
                places = np.split(part[:, left : left + width], copies, axis=1)
                assert all(np.array_equal(place, places[0]) for place in places)
    texts = captions(collection, collection.items[0])
    assert all(value in texts[0] for value in collection.items[0].facts.values()) and len(set(texts)) == 5


def test_facts_are_even_and_drawings_belong_to_one_split(collection):
    for name, fact in FACTS.items():
        counts = Counter(item.facts[name] for item in collection.items)
        assert set(counts) == set(fact.values)
        assert max(counts.values()) < 2.5 * 300 / len(fact.values)
    assert Counter(item.split for item in collection.items) == {"train": 200, "val": 50, "test": 50}
    assert len({drawing.kind for drawing in drawings()}) == 10 and len(drawings()) > 1000
    again = icons(300)
    assert again == collection and icons(300, seed=1).items[0].png != collection.items[0].png
    assert Counter(item.title for item in collection.items).most_common(1)[0][1] < 15


def test_from_an_official_tree_of_icons_to_shards(collection, tmp_path):
    raw = write_tree("coco_karpathy", collection, tmp_path / "raw")
    index, _ = convert(source_of("coco_karpathy", raw), tmp_path / "out")
    assert sum(map(index.samples, index.splits)) == 300 and index.skipped == {}
    entry = json.loads((raw / "karpathy/dataset_coco.json").read_text())["images"][0]
    first = ShardSet(tmp_path / "out", "train").read(0)
    assert first.info["captions"] == [sentence["raw"] for sentence in entry["sentences"]]
    assert first.images["image"] == (raw / entry["filepath"] / entry["filename"]).read_bytes()


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def package(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_packages_are_fetched_once(tmp_path, monkeypatch):
    archive = package(tmp_path / "some.tgz", {"a/b.json": b"1", "c.txt": b"2", "../d": b"3"})
    fake_npm(tmp_path / "bin", f'echo "$@" >> {tmp_path}/log; cp {archive} "$4/some-1.0.0.tgz"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    cache = tmp_path / "cache"
    for _ in range(2):
        folder = fetch("some", "1.0.0", ["a/b.json"], cache)
    assert (folder / "a/b.json").read_bytes() == b"1" and not (folder / "c.txt").exists()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("pack ") and line.endswith(" some@1.0.0")
    with pytest.raises(DataError, match="some-1.0.0.tgz has no file x"):
        fetch("some", "1.0.0", ["x"], cache)
    assert [path.name for path in cache.iterdir()] == ["some-1.0.0"] and (folder / "a/b.json").is_file()


def test_what_npm_cannot_do_is_one_line(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin", "echo 'npm error 404 Not Found' >&2; echo 'npm error more' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(DataError, match="^npm could not fetch some@1.0.0: 404 Not Found$"):
        fetch("some", "1.0.0", ["x"], tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="^npm, which fetches some@1.0.0, is not installed"):
        fetch("some", "1.0.0", ["x"], tmp_path / "cache")
    with pytest.raises(SystemExit) as end:
        command.main(["icons", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert str(end.value).startswith("error: npm, which fetches emoji-datasource@15.1.2, is not installed")


def test_the_command_says_how_to_convert(tmp_path, capsys):
    command.main(["easy_vqa", "--out", str(tmp_path / "a b"), "--source", "nlvr2", "glue", "--limit", "12"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 and all("source.task=" in line for line in lines[1:])
    _, _, module, *arguments = shlex.split(lines[0])
    done = run(module, *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "train: 8 samples, 32 statements" in done.stdout, done.stderr
    script = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True)
    assert script.returncode == 0, script.stderr
