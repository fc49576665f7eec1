"""`python -m bt.doctor` on this machine, and what it calls missing or broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bt import doctor


def test_this_machine_can_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    doctor.main(["--json"])
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["torch"] == {
        "name": "torch",
        "state": "ok",
        "found": importlib.metadata.version("torch"),
        "matters": "every run",
    }
    assert found["working directory"]["found"].startswith(str(tmp_path))
    assert found["conf"]["state"] == found["extra dev"]["state"] == "ok"
    assert "mlflow.db, made by the first run" in found["mlflow store"]["found"]
    assert {"python", "shared memory", "git", "sbatch", "npm", "chromium", "chromedriver"} <= set(found)
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


@pytest.mark.parametrize("given", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(given):
    """As `python -m bt.doctor | head -1` does; the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from bt import doctor; doctor.checks = lambda: [doctor.Check('x', 'ok', 'y')]; doctor.main({given})"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_says_what_every_extra_is_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert set(doctor.EXTRAS) == set(project["project"]["optional-dependencies"])


def test_what_is_needed_breaks_and_what_is_not_is_missing(capsys, tmp_path, monkeypatch):
    requires = ["torch>=99", "numpy>=2", "no-such-package>=1", 'other-package>=1; extra == "slurm"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    found = {check.name: check for check in doctor.requirements()}
    assert (found["torch"].state, found["no-such-package"].state, found["numpy"].state) == ("broken", "broken", "ok")
    assert f"{importlib.metadata.version('torch')} is not >=99" in found["torch"].found
    assert found["extra slurm"].state == "missing" and "other-package: not installed" in found["extra slurm"].found
    assert [check.state for check in doctor.shared_memory(tmp_path / "none")] == ["missing"]
    assert {check.state for check in doctor.programs(lambda name: None)} == {"missing"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    (store,) = doctor.tracking()
    assert store.state == "missing" and "secret" not in store.found
    looked = {name: lambda: iter(()) for name in ("requirements", "devices", "tracking", "libraries")}
    for name, look in looked.items():
        monkeypatch.setattr(doctor, name, look)

    def folders():
        raise PermissionError("no")

    monkeypatch.setattr(doctor, "folders", folders)
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    assert end.value.code == "broken: folders" and "broken  folders" in capsys.readouterr().out
