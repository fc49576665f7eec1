"""The demo's own work: three commands in a row, its table, its picture, and its verdict."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_demo_reports_and_fails_below_its_least_accuracy(tmp_path):
    """With untrained tiny encoders: the whole way, ending with an error because the accuracy is far too low."""
    done = subprocess.run(
        [sys.executable, "-m", "bt.demo", "trainer=smoke", "tracking=none", "run_dir=out"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    accuracy = 100 * report["accuracy"]
    assert accuracy < 97 and f"test accuracy {accuracy:.2f} % is below 97 %" in done.stderr
    printed = done.stdout[done.stdout.index("test accuracy") :]
    rows = [line.split("  ")[0] for line in printed.splitlines() if " %  " in line]
    assert rows == ["majority answer", "question only", "author's CNN", "this model"]
    assert report["accuracy"] == report["fine_tuning"]["metrics"]["vqa/test/score"]
    assert list(report["seconds"]) == ["shards", "pre-training", "fine-tuning and test"]
    with Image.open(tmp_path / "out/questions.png") as picture:
        assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 100
