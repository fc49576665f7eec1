"""What the benchmark writes beside its ratios: savings, parts, growth, bars and the README's table."""

import json

import pytest

from bt.bench import growth, parts, savings
from bt.bench.official import OFFICIAL, Scheme
from bt.bench.results import END, START, draw, main, shown

RESULT = {
    "name": "pretrain_1",
    "work": "a step",
    "against": "transformers",
    "ratio": 1.7,
    "spread": [1.6, 1.8],
    "ours": 0.68,
    "peer": 0.4,
    "unit": "pairs/s",
    "loss_difference": 2e-7,
    "gemm_share": [0.84, 0.8],
    "date": "2026-11-25",
    "machine": "a processor, 2 threads",
    "versions": "torch 2",
}


def test_every_saving_takes_work_away_and_leaves_the_losses(tmp_path):
    """measure() itself refuses other losses. Operations fall where a saving is one of operations."""
    savings.main(["--size", "tiny", "--rounds", "1", "--out", str(tmp_path / "savings.json")])
    results = json.loads((tmp_path / "savings.json").read_text())["results"]
    assert [r["name"] for r in results] == ["released scheme", *Scheme().__dict__]
    work = {r["name"]: r["gflop"] for r in results}
    steps = list(work.items())
    for (_, before), (name, after) in zip(steps[:-1], steps[1:], strict=True):
        if name in ("apart", "padded", "every_position", "whole_layers", "projected"):
            assert after < 0.99 * before, name
        # SDPA's backward pass computes its scores once more.
        assert after < 1.1 * before, name
    assert all(r["seconds"] > 0 for r in results) and savings.savings()[-1][1] == Scheme() != OFFICIAL


def test_parts_add_up(tmp_path, capsys):
    parts.main(["--size", "tiny", "--out", str(tmp_path / "parts.json")])
    found = json.loads((tmp_path / "parts.json").read_text())
    rows = {row["part"]: row for row in found["parts"]}
    assert list(rows) == ["vision", "text", "cross", "heads", "optimizer"]
    assert rows["optimizer"]["gflop"] == 0 and rows["optimizer"]["bound"] == "memory"
    assert min(rows[part]["gflop"] for part in ("vision", "text", "cross")) > rows["heads"]["gflop"] > 0
    # What is tiny stays in a cache, faster than the memory that the roofline counts with.
    assert all(row["gb"] > 0 and row["roofline_share"] > 0 for row in rows.values())
    assert found["loading_seconds_per_image"] > 0 and "of its roofline" in capsys.readouterr().out


def test_growth_is_measured_beside_its_prediction(tmp_path):
    growth.main(["--size", "tiny", "--only", "cross_layers,batch", "--repeats", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "growth.json").read_text())
    layers = found["series"]["cross_layers"]
    assert [point["cross_layers"] for point in layers] == [0, 1, 2]
    # More layers are more operations; two towers without any have one pass of each encoder.
    assert layers[0]["predicted"] > layers[1]["predicted"] > layers[2]["predicted"]
    assert all(point["pairs_per_second"] > 0 for point in layers)
    for name in ("cross_layers", "batch"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_growth_names_what_it_does_not_know(tmp_path, capsys):
    with pytest.raises(SystemExit):
        growth.main(["--only", "colour", "--out", str(tmp_path)])
    assert "there is no 'colour'; allowed are texts_per_image" in capsys.readouterr().err


def test_table_and_bars(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([{**RESULT, "ratio": 1.0}, {**RESULT, "name": "memory", "unit": "GB"}]))
    (tmp_path / "b.json").write_text(json.dumps([RESULT]))
    (tmp_path / "README.md").write_text(f"before\n{START}\nold\n{END}\nafter\n")
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    monkeypatch.setattr("sys.argv", ["results", *files, "--readme", str(tmp_path / "README.md")])
    main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| `pretrain_1` | a step | transformers | 1.70 | 0.68 pairs/s | 0.4 pairs/s |" in text
    assert "| `memory` |" in text and "(a processor, 2 threads, torch 2, 2026-11-25; `make bench`)" in text
    assert "84 %, 80 %" in shown([RESULT])
    draw([RESULT], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
