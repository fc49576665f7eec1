"""`python -m bt.predict`: one question, files of them, damage, and a kill in the middle."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bt.config import read_config
from bt.data.shards import ShardSet
from bt.predict.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def predict(capfd):
    """Runs the command in this process: exit status (a message where it ends with one), and standard output."""

    def call(*arguments: object) -> tuple[object, str]:
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as end:
            status = end.code
        return status, capfd.readouterr().out

    return call


@pytest.fixture(scope="module")
def folder(smoke_runs, tmp_path_factory) -> Path:
    """questions.csv with its pictures in pictures/: a row for every question of the run's test split."""
    root = tmp_path_factory.mktemp("questions")
    (root / "pictures").mkdir()
    shards = ShardSet(str(smoke_runs / "data/samples/vqav2"), read_config(smoke_runs / "runs/vqa_base").data.test_split)
    with (root / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "image", "question"])
        for sample in map(shards.read, range(len(shards))):
            (root / "pictures" / f"{sample.key}.jpg").write_bytes(sample.images["image"])
            for entry in sample.info["questions"]:
                writer.writerow([entry["id"], f"pictures/{sample.key}.jpg", entry["question"]])
    return root


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_question_of_every_kind(smoke_runs, folder, predict, vqa, pretrained):
    image = sorted((folder / "pictures").iterdir())[0]
    runs = smoke_runs / "runs"
    status, out = predict("--run-dir", runs / "vqa_base", "--image", image, "--text", "is it red?", "--top", 2)
    first, second = vqa.answer(image, "is it red?", top=2)
    assert status == 0 and [line.split() for line in out.splitlines()[2:]] == [
        [choice.name, f"{choice.probability:.4f}"] for choice in (first, second)
    ]
    status, out = predict("--run-dir", runs / "vqa_base", "--image", image, "--text", "is it red?", "--json")
    assert json.loads(out)["answers"][0] == {"answer": first.name, "probability": pytest.approx(first.probability)}
    status, out = predict("--run-dir", runs / "pretrain_base", "--image", image, "--text", "a red circle", "--json")
    score = pytest.approx(pretrained.match(image, "a red circle"))
    assert json.loads(out) == {"task": "match", "score": score, "by": "itm"}
    status, out = predict("--run-dir", runs / "pretrain_base", "--image", image, "--text", "the [MASK] .", "--json")
    ((best, *_),) = pretrained.fill_mask(image, "the [MASK] .")
    assert json.loads(out)["masks"][0][0] == {"word": best.name, "probability": pytest.approx(best.probability)}
    status, out = predict("--run-dir", runs / "nlvr2_base", "--image", image, image, "--text", "both", "--json")
    assert {label["label"] for label in json.loads(out)["labels"]} == {"True", "False"}
    status, out = predict("--run-dir", runs / "snli_ve_base", "--image", image, "--text", "a circle", "--json")
    assert sum(label["probability"] for label in json.loads(out)["labels"]) == pytest.approx(1)


def test_files_and_shards_give_the_runs_own_predictions(smoke_runs, folder, predict, tmp_path):
    run = smoke_runs / "runs/vqa_base"
    status, out = predict("--run-dir", run, "--input", folder / "questions.csv", "--out", tmp_path / "a.jsonl")
    assert status == 0, status
    found, expected = rows_of(tmp_path / "a.jsonl"), rows_of(run / "predictions-test.jsonl")
    by_id = {row["number"]: row for row in found}
    assert len(by_id) == len(found) == len(expected) > 8
    for row in expected:
        best = by_id[str(row["question_id"])]["answers"][0]
        assert (best["answer"], best["probability"]) == (row["answer"], pytest.approx(row["probability"], abs=6e-5))
    assert f"answer: {len(found)} rows" in out and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    # The same as JSONL elsewhere, and from the shards.
    lines = [{"id": row["number"], "image": row["image"], "text": row["question"]} for row in found]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source, more, out in (
        (tmp_path / "b.jsonl", ["--images", folder], "c.jsonl"),
        (smoke_runs / "data/samples/vqav2", ["--split", read_config(run).data.test_split, "--batch", 5], "d.jsonl"),
    ):
        status, _ = predict("--run-dir", run, "--input", source, *more, "--out", tmp_path / out)
        assert status == 0, status
        same = rows_of(tmp_path / out)
        assert [str(row["id"]) for row in same] == [row["number"] for row in found]
        assert [row["answers"][0]["answer"] for row in same] == [row["answers"][0]["answer"] for row in found]


def test_a_killed_command_goes_on_without_doubled_or_missing_lines(smoke_runs, folder, predict, tmp_path):
    run, out = smoke_runs / "runs/vqa_base", tmp_path / "killed.jsonl"
    given = ["--run-dir", run, "--input", folder / "questions.csv", "--batch", "1"]
    assert predict(*given, "--out", tmp_path / "whole.jsonl")[0] == 0
    partial = out.with_name("killed.jsonl.partial")
    command = [sys.executable, "-m", "bt.predict", *map(str, given), "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not partial.exists():  # it was quicker than its killer
        out.rename(partial)
        lines = partial.read_bytes().splitlines(keepends=True)
        partial.write_bytes(b"".join(lines[:7]))
    done = partial.read_bytes().count(b"\n")
    with partial.open("ab") as file:
        file.write(b'{"number": "3", "ima')  # half of a line
    # Other options do not go on with its lines.
    status, _ = predict(*given, "--top", 2, "--out", out)
    assert "holds results of other input or options" in status
    status, said = predict(*given, "--out", out)
    assert status == 0 and f"going on behind {done} of" in said
    # Two processes' products need not agree to the last bit, so answers of nearly equal probability may change places.
    for found, expected in zip(rows_of(out), rows_of(tmp_path / "whole.jsonl"), strict=True):
        probabilities = [{a["answer"]: a["probability"] for a in row.pop("answers")} for row in (found, expected)]
        assert found == expected and probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
    status, _ = predict(*given, "--out", out)
    assert "is there already" in status


def test_bad_rows_fail_clearly_or_are_written_down(smoke_runs, folder, predict, tmp_path):
    good = rows = list(csv.DictReader((folder / "questions.csv").open()))[:6]
    good = str(folder / rows[0]["image"])
    (tmp_path / "broken.png").write_bytes(Path(good).read_bytes()[:100])
    lines = [
        {"id": 1, "image": good, "text": "is it red?"},
        {"id": 2, "image": "broken.png", "text": "is it red?"},
        {"id": 3, "image": good, "text": ""},
        {"id": 4, "image": "missing.png", "text": "is it red?"},
        {"id": 5, "image": good, "text": "is it red?"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--run-dir", smoke_runs / "runs/vqa_base", "--input", tmp_path / "in.jsonl"]
    status, _ = predict(*given, "--out", tmp_path / "fails.jsonl")
    assert status.startswith("error: row 2: ") and "broken.png cannot be decoded" in status and "\n" not in status
    assert [row["id"] for row in rows_of(tmp_path / "fails.jsonl.partial")] == [1]
    # What the message says goes on with the lines so far.
    status, out = predict(*given, "--on-bad", "skip", "--out", tmp_path / "fails.jsonl")
    assert status == 0 and "going on behind 1 of 5 rows" in out
    assert [row["id"] for row in rows_of(tmp_path / "fails.jsonl")] == [1, 2, 3, 4, 5]
    status, out = predict(*given, "--on-bad", "skip", "--out", tmp_path / "out.jsonl")
    found = rows_of(tmp_path / "out.jsonl")
    assert status == 0 and "5 rows, 3 of them errors" in out and [row["id"] for row in found] == [1, 2, 3, 4, 5]
    assert ["error" in row for row in found] == [False, True, True, True, False]
    assert found[0]["answers"] == found[4]["answers"] and "must not be empty" in found[2]["error"]


def test_damaged_shards_are_written_down(smoke_runs, predict, tmp_path):
    import shutil

    shards = shutil.copytree(smoke_runs / "data/samples/vqav2", tmp_path / "shards")
    split = read_config(smoke_runs / "runs/vqa_base").data.test_split
    file = next(shards.glob(f"{split}-*.tar"))
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    given = ["--run-dir", smoke_runs / "runs/vqa_base", "--input", shards, "--split", split]
    status, _ = predict(*given, "--on-bad", "skip", "--out", tmp_path / "out.jsonl")
    found = rows_of(tmp_path / "out.jsonl")
    bad = [row for row in found if "error" in row]
    assert status == 0 and 0 < len(bad) < len(found) and all("CRC-32" in row["error"] for row in bad)
    assert len(found) == ShardSet(str(shards), split).counts("questions").sum()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "a.png", "b.png", "--text", "x"], "two pictures, which --task answer does not take"),
        (["--image", "{image}", "--text", "x", "--task", "match"], "has no head for matching"),
        (["--image", "{image}", "--text", "x", "--by", "itm"], "--by is for --task match, and this is answer"),
        (["--image", "{image}", "--text", "x", "--device", "meta"], "device=meta is no device to use: allowed are"),
        (["--input", "nowhere.csv", "--out", "o.jsonl"], "nowhere.csv does not exist"),
        (["--input", "in.txt", "--out", "o.jsonl"], "neither a file NAME.csv or NAME.jsonl nor a folder"),
        (["--input", "no_image.csv", "--out", "o.jsonl"], "no_image.csv:2: there must be columns image and one of"),
        (["--input", "ragged.csv", "--out", "o.jsonl"], "ragged.csv:2 has not as many columns"),
        (["--input", "bad.jsonl", "--out", "o.jsonl"], "bad.jsonl:1 is not JSON"),
    ],
)
def test_what_does_not_go_is_one_line(smoke_runs, folder, predict, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("no_image.csv").write_text("picture,text\na.png,x\n")
    Path("ragged.csv").write_text("image,text\na.png\n")
    Path("bad.jsonl").write_text("{'image': 1}\n")
    Path("in.txt").write_text("")
    image = sorted((folder / "pictures").iterdir())[0]
    given = [argument.format(image=image) for argument in arguments]
    status, _ = predict("--run-dir", smoke_runs / "runs/vqa_base", *given)
    assert said in status and "\n" not in status and status.startswith("error: ")
