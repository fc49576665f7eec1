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
    with pytest.raises(DataError, match="of other pictures or of another model"):
        build(other, folder, out)
    with pytest.raises(DataError, match="was not made with"):
        Searcher(other, ImageIndex(out))


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
        (["index", "--images", "every", "--run-dir", run, "--out", "small"], "of other pictures or of another model"),
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
