"""Bars, lines and tables on the way; report, circumstances and plots at the end."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import subprocess
from pathlib import Path

import torch
from PIL import Image

from bt.engine.progress import Progress, duration, table
from bt.engine.report import environment, git_state, peak_memory, plot_curves, tracking_tags, write_report
from bt.engine.tracking import Journal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(200, start=100, stream=stream)
    progress.began -= 30.0  # thirty seconds for the fifty steps below
    progress.step(150)
    progress.report(150, 0.75, {"mlm": 2.34567, "itm": 0.5}, 1234.4, 0.123)
    progress.say("saved")
    progress.close()
    expected = "step 150/200  epoch 0.75  mlm 2.3457  itm 0.5000  1,234 pairs/s  data wait 12 %  0:00:30 left\nsaved\n"
    assert stream.getvalue() == expected


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(200, start=100, stream=stream)
    progress.step(149)
    progress.report(150, 0.75, {"mlm": 2.34567}, 1234.4, 0.0)
    progress.say("saved")
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "75%" in last and "150/200" in last and "mlm 2.3457  1,234 pairs/s  data wait 0 %" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", last)
    assert "saved\n" in stream.getvalue()


def test_other_ranks_are_silent():
    stream = io.StringIO()
    progress = Progress(10, stream=stream, shown=False)
    progress.report(1, 0.1, {"vqa": 1.0}, 1.0, 0.0)
    progress.say("x")
    progress.close()
    assert stream.getvalue() == ""


def test_table_and_duration():
    text = table([["majority", 0.373, 1], ["this model", 0.99, 120]], ["what", "accuracy", "s"])
    assert text.splitlines() == [
        "what        accuracy    s",
        "----------  --------  ---",
        "majority      0.3730    1",
        "this model    0.9900  120",
    ]
    assert (duration(3725.2), duration(59.6), duration(-1)) == ("1:02:05", "0:01:00", "0:00:00")


def test_circumstances():
    around = environment(torch.device("cpu"))
    assert around["versions"]["torch"] == importlib.metadata.version("torch")
    assert around["device_type"] == "cpu" and around["device"] and around["cores"] >= 1
    state = git_state()
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert state["git_revision"] == (asked.stdout.strip() if asked.returncode == 0 else None)
    tags = tracking_tags(torch.device("cpu"))
    assert all(isinstance(value, str) for value in tags.values())
    assert tags["git_dirty"] == str(git_state()["git_dirty"]) and tags["version.hydra-core"].startswith("1.3")


def test_peak_memory_is_in_bytes_and_never_falls():
    before = peak_memory(torch.device("cpu"))["peak_memory_bytes"]
    filled = torch.ones(64 * 2**20, dtype=torch.float32)
    after = peak_memory(torch.device("cpu"))["peak_memory_bytes"]
    assert filled.nbytes < after
    del filled
    assert before <= after <= peak_memory(torch.device("cpu"))["peak_memory_bytes"]


def test_report_and_curves(tmp_path):
    assert json.loads(write_report(tmp_path, {"vqa/test/score": 0.5}).read_text()) == {"vqa/test/score": 0.5}
    assert plot_curves(tmp_path) is None
    journal = Journal(tmp_path)
    for step in range(1, 20):
        journal.append({"step": step, "epoch": step / 10, "vqa/train/loss": 1 / step, "lr/base": 0.1})
    alone = plot_curves(tmp_path, "alone.png")
    journal.append({"step": 19, "vqa/val/score": 0.5, "vqa/val/loss": 0.1})
    both = plot_curves(tmp_path)
    sizes = [Image.open(path).size for path in (alone, both)]
    assert sizes[0][1] == sizes[1][1] and sizes[1][0] == 2 * sizes[0][0]  # one panel, two panels
    assert len(Image.open(both).convert("RGB").getcolors(maxcolors=2**24)) > 10  # several lines, and not blank
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone.png",
        "curves.png",
        "metrics.jsonl",
        "report.json",
    ]
