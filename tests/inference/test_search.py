"""`python -m bt.search`: hits are what ITM puts first of what ITC chooses; indexes go on, and pages are safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import bt
from bt.data.shards import ShardSet
from bt.errors import DataError
from bt.search import index as indexing
from bt.search.__main__ import main
from bt.search.index import ImageIndex, build
from bt.search.query import Hit, Searcher, measure

TEXT = "a red circle <b>&amp;</b>"


@pytest.fixture(scope="module")
def folder(smoke_runs, tmp_path_factory) -> Path:
    """Eleven pictures in two folders, one that is damaged, and a file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    shards = ShardSet(str(smoke_runs / "data/samples/vqav2"), ["train", "val"])
    (root / "below").mkdir()
    for number in range(11):
        place = root / "below" if number % 2 else root
        data = shards.read(number).images["image"]
        (place / f"{number}.jpg").write_bytes(data)
    (root / "<script>alert(1)<").mkdir()
    (root / "0.jpg").rename(root / "<script>alert(1)<" / "0.jpg")
    (root / "bad.png").write_bytes(data[:50])
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def index(folder, pretrained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("index") / "index"
    indexing.PART, kept = 4, indexing.PART
    about = build(pretrained, folder, out)
    indexing.PART = kept
    assert [*about["bad"]] == ["bad.png"] and len(about["images"]) == 12
    return out


def test_hits_are_in_the_order_of_the_heads(index, pretrained):
    opened = ImageIndex(index)
    searcher = Searcher(pretrained, opened)
    paths = opened.paths
    match = torch.tensor(pretrained.match(paths, TEXT))
    cosine = torch.tensor(pretrained.match(paths, TEXT, by="itc"))
    hits = searcher.search(TEXT, k=4, shortlist=None)
    assert [hit.path for hit in hits] == [paths[i] for i in match.argsort(descending=True)[:4].tolist()]
    for hit in hits:  # states are kept in half precision
        assert hit.score == pytest.approx(match[paths.index(hit.path)].item(), abs=2e-3)
        assert hit.similarity == pytest.approx(cosine[paths.index(hit.path)].item(), abs=1e-5)
    chosen = cosine.topk(5).indices.tolist()
    expected = sorted(chosen, key=lambda i: -match[i])
    hits = searcher.search(TEXT, k=5, shortlist=5)
    assert [hit.path for hit in hits] == [paths[i] for i in expected]
    assert len(searcher.search(TEXT, k=100, shortlist=2)) == 11
    # An index without states encodes the shortlist anew, without their rounding.
    rows = measure(searcher, [TEXT, "a blue shape"], 3, [3, 6])
    assert [row["shortlist"] for row in rows] == [3, 6, 11] and rows[-1]["recall"] == 1
    texts = [TEXT, "a blue shape"]
    for row in rows:
        shares = []
        for text in texts:
            best = searcher.search(text, 3, None)
            near = torch.tensor(pretrained.match(paths, text, by="itc")).topk(row["shortlist"]).indices.tolist()
            shares.append(sum(hit.path in [paths[i] for i in near] for hit in best) / 3)
        assert row["recall"] == pytest.approx(sum(shares) / 2)


def test_an_index_that_was_interrupted_goes_on(smoke_runs, index, folder, pretrained, tmp_path, monkeypatch):
    out = shutil.copytree(index, tmp_path / "index")
    parts = sorted(out.glob("part-*"))
    assert len(parts) == 3
    with safe_open(parts[1], "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    about = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**about, "complete": False}))
    with pytest.raises(DataError, match="is not complete"):
        ImageIndex(out)
    monkeypatch.setattr(indexing, "PART", 4)
    assert build(pretrained, folder, out) == about and parts[0].stat().st_mtime_ns == before
    with safe_open(parts[1], "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in kept.items())
    other = bt.load(smoke_runs / "runs/pretrain_base")
    next(other.model.parameters()).data.add_(1)
    with pytest.raises(DataError, match="of another folder, of another model"):
        build(other, folder, out)
    with pytest.raises(DataError, match="was not made with"):
        Searcher(other, ImageIndex(out))


def test_files_that_have_changed_are_indexed_anew(folder, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "PART", 2)
    files = sorted((folder / "below").iterdir())
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    pictures, out = tmp_path / "pictures", tmp_path / "index"
    pictures.mkdir()
    for name, file in zip(names, files, strict=True):
        shutil.copy(file, pictures / name)

    def times() -> list[int]:
        return [part.stat().st_mtime_ns for part in sorted(out.glob("part-*"))]

    def check() -> list[str]:
        build(pretrained, pictures, out)
        opened = ImageIndex(out)
        torch.testing.assert_close(opened.features, pretrained.image_features(opened.paths))
        assert len(opened.states([0, len(opened) - 1], torch.device("cpu")).cls) == 2
        return [path.name for path in opened.paths]

    assert check() == names
    before = times()
    assert check() == names and times() == before
    shutil.copy(files[0], pictures / "c.jpg")
    assert check() == names
    assert [new == old for new, old in zip(times(), before, strict=True)] == [True, False, True]
    shutil.copy(files[1], pictures / "bb.jpg")
    assert check() == ["a.jpg", "b.jpg", "bb.jpg", "c.jpg", "d.jpg", "e.jpg"] and times()[0] == before[0]
    for name in names[2:]:
        (pictures / name).unlink()
    assert check() == ["a.jpg", "b.jpg", "bb.jpg"] and len(times()) == 2
    monkeypatch.setattr(pretrained.loaded.config.data, "resize", "fast")
    with pytest.raises(DataError, match="of images prepared otherwise"):
        build(pretrained, pictures, out)


def test_a_model_that_cannot_be_asked_is_not_indexed(folder, vqa, tmp_path):
    with pytest.raises(DataError, match="vqa_base.* has neither ITC nor ITM: nothing to search by"):
        build(vqa, folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_commands_write_sheets_that_run_nothing(smoke_runs, folder, index, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(smoke_runs / "runs/pretrain_base")
    main(["index", "--images", str(folder), "--run-dir", run, "--out", "small", "--no-states"])
    said = capsys.readouterr().out
    assert "11 pictures in small" in said and "1 could not be read" in said and "bad.png cannot be decoded" in said
    orders = []
    for place in ("small", str(index)):
        main(["query", TEXT, "--run-dir", run, "--index", place, "--k", "6", "--out", f"hits-{len(orders)}"])
        orders.append([hit["path"] for hit in json.loads(Path(f"hits-{len(orders)}/hits.json").read_text())["hits"]])
    assert orders[0] == orders[1] and len(orders[0]) == 6
    page = Path("hits-0/hits.html").read_text()
    main(["query", TEXT, "--run-dir", run, "--index", "small", "--k", "11", "--out", "every"])
    page = Path("every/hits.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;" in page and page.count("<img ") == 11
    assert "a red circle &lt;b&gt;&amp;amp;&lt;/b&gt;" in page and "<b>" not in page
    with Image.open("every/hits.png") as sheet:
        assert sheet.size == (5 * 192, 18 + 3 * 210)
        first = sheet.crop((0, 18, 192, 210)).resize((8, 8)).convert("L")
        assert first.getextrema()[0] < 250  # a picture, not white
    Path("texts").write_text("a red circle\n\na blue square\n")
    main(["measure", "--texts", "texts", "--run-dir", run, "--index", str(index), "--sizes", "2", "--k", "2"])
    assert "2 texts, 11 pictures" in capsys.readouterr().out
    for arguments, message in (
        (["query", "x", "--run-dir", run, "--index", "none"], "none is no index of pictures"),
        (["query", " ", "--run-dir", run, "--index", "small"], "a text must not be empty"),
        (["index", "--images", "none", "--run-dir", run, "--out", "o"], "none is not a folder"),
        (["index", "--images", "every", "--run-dir", run, "--out", "small"], "of another folder, of another model"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert message in end.value.code and "\n" not in end.value.code


def test_a_model_without_a_ranker_searches_by_features_alone(pretrained, index):
    searcher = Searcher(pretrained, ImageIndex(index))
    searcher.ranker = None
    hits = searcher.search(TEXT, 3)
    cosine = torch.tensor(pretrained.match(searcher.index.paths, TEXT, by="itc"))
    assert [hit.path for hit in hits] == [searcher.index.paths[i] for i in cosine.topk(3).indices.tolist()]
    assert hits[0] == Hit(hits[0].path, None, pytest.approx(cosine.max().item(), abs=1e-5))
