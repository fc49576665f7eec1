"""Many writers to one store: MLflow on a real PostgreSQL, started by `make mlflow-server`'s script."""

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.engine.writers import check_store, write_side_by_side
from tests.launchers.helpers import ROOT, until


@pytest.fixture
def server():
    """The address of a server on PostgreSQL."""
    if not glob.glob("/usr/lib/postgresql/*/bin/initdb"):
        pytest.skip("PostgreSQL is not installed: apt-get install -y postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install -e '.[tracking]'")
    place = Path(tempfile.mkdtemp())  # where the user postgres can get to
    place.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    around = {"MLFLOW_SERVER_DIR": str(place / "server"), "MLFLOW_SERVER_PORT": str(port), "PYTHON": sys.executable}
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [str(ROOT / "launchers/mlflow_server.sh")], env=os.environ | around, stdout=log, stderr=log
        )

    def answers() -> bool:
        assert process.poll() is None, (place / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(answers, "the server answers")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    assert not list((place / "server/database").glob("postmaster.pid")), "PostgreSQL ends with the server"
    shutil.rmtree(place)


@pytest.mark.timeout(900)
def test_four_members_write_at_the_same_time(server, tmp_path):
    printed = write_side_by_side(server.replace("//", "//user:hunter2@"), tmp_path, 4)
    assert "hunter2" not in printed and "View run" not in printed
    check_store(MlflowClient(server), tmp_path, 4)

    def status(name: str) -> int:
        """Of a request that calls the server by that name."""
        request = urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/get?experiment_id=0")
        request.add_header("Host", f"{name}:5000")
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    assert (status(socket.gethostname()), status("elsewhere.example")) == (200, 403)
