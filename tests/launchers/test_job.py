"""What a rank does in its job, without a SLURM."""

from types import SimpleNamespace

import pytest

from launchers import job


@pytest.mark.parametrize(
    "reason, nodes, scontrol, waited",
    [
        ("lost at step 3: rank 1 on b", "2", "echo 'SlurmdTimeout           = 20 sec'", [80]),
        ("lost at step 3: rank 1 on b", "2", "exit 1", [360]),
        ("lost at step 3: rank 1 on a", "1", "exit 1", []),
        ("rank 1 on b, step 3, training: out of memory", "2", "exit 1", []),
    ],
)
def test_slurm_is_waited_for_where_a_node_may_be_down(tmp_path, monkeypatch, capsys, reason, nodes, scontrol, waited):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_NNODES", nodes)
    slept = []
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=slept.append))
    job.wait_for_slurm(reason)
    assert slept == waited
    assert capsys.readouterr().out.startswith(reason) == bool(waited)
