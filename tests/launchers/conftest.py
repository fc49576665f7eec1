import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.launchers.helpers import ROOT


class Cluster:
    """A local SLURM of two nodes; `command` runs its clients and launchers/slurm_local.sh."""

    def __init__(self, directory: Path):
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.around = {
            "SLURM_LOCAL_DIR": str(directory),
            "SLURM_LOCAL_PORT": str(port),
            "SLURM_CONF": str(directory / "slurm.conf"),
        }

    def script(self, *words: str) -> str:
        return self.command(str(ROOT / "launchers/slurm_local.sh"), *words)

    def command(self, *words: str) -> str:
        done = subprocess.run(words, env=os.environ | self.around, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM, started for these tests alone; its clients find it by the environment."""
    if os.geteuid() != 0:
        pytest.skip("a local SLURM needs root")
    if not os.access("/etc/hosts", os.W_OK):
        pytest.skip("a local SLURM writes its nodes' names to /etc/hosts, which is read-only here")
    paths = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=paths)]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} not found): apt-get install -y slurm-wlm munge")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.script("up")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in made.around.items():
                patch.setenv(name, value)
            yield made
    finally:
        made.script("down", "--purge")
