import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bt.data.shards import ShardSet
from bt.errors import ConfigError, DataError
from tests.data.helpers import truncate


def test_remote_shards_are_fetched_once(small_dir, tmp_path):
    log = tmp_path / "log"
    place = f"pipe:echo {{name}} >> {log}; cat {small_dir}/{{name}}"
    local, remote = ShardSet(small_dir, "train"), ShardSet(place, "train", cache_dir=str(tmp_path / "cache"))
    assert "train-000000.npy" in log.read_text() and ".tar" not in log.read_text()
    assert [remote.read(i) for i in (0, 33, 34)] == [local.read(i) for i in (0, 33, 34)]
    again = ShardSet(place, "train", cache_dir=str(tmp_path / "cache"))
    assert again.read(33) == local.read(33)
    names = log.read_text().split()
    assert (names.count("train-000000.tar"), names.count("train-000003.tar")) == (1, 1)
    assert names.count("train-000000.npy") == 1
    assert "train-000001.tar" not in names
    assert names.count("index.json") == 2  # so that a change at the source is seen


def test_shards_over_http(small_dir, tmp_path):
    """A server on this machine: every file is fetched once; what it does not have is one line."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *arguments):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(small_dir.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url, cache = f"http://127.0.0.1:{server.server_port}/{small_dir.name}", str(tmp_path / "cache")
        local = ShardSet(small_dir, "val")
        for _ in range(2):
            remote = ShardSet(url, "val", cache)
            assert [remote.read(i) for i in range(len(remote))] == [local.read(i) for i in range(len(local))]
        assert asked.count(f"/{small_dir.name}/val-000000.tar") == asked.count(f"/{small_dir.name}/val-000000.npy") == 1
        with pytest.raises(DataError, match="cannot fetch http://.*/nothing/index.json") as caught:
            ShardSet(url.replace(small_dir.name, "nothing"), "val", cache)
        assert "\n" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


def test_shards_in_s3(small_dir, tmp_path, monkeypatch):
    """Read by the command `aws s3 cp URL -`, here one that serves a folder."""
    command = tmp_path / "bin/aws"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && cat "{small_dir.parent}/${{3#s3://bucket/}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    remote = ShardSet(f"s3://bucket/{small_dir.name}", "train", str(tmp_path / "cache"))
    local = ShardSet(small_dir, "train")
    assert len(remote) == len(local) and remote.read(33) == local.read(33)
    with pytest.raises(DataError, match="cannot fetch s3://bucket/nothing/index.json"):
        ShardSet("s3://bucket/nothing", "train", str(tmp_path / "cache"))


def test_readers_at_once_do_not_share_a_temporary_file(small_dir, tmp_path):
    """Many at once, as the workers of several machines on one cache: every one reads whole files."""
    place, cache = f"pipe:cat {small_dir}/{{name}}", str(tmp_path / "cache")
    local = ShardSet(small_dir, "val")
    expected = [local.read(number) for number in range(len(local))]

    def read(_) -> list:
        opened = ShardSet(place, "val", cache)
        return [opened.read(number) for number in range(len(opened))]

    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(read, range(16)))
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_changed_source_is_fetched_anew(small_dir, data_dir, tmp_path):
    place = f"pipe:cat {tmp_path}/link/{{name}}"
    (tmp_path / "link").symlink_to(small_dir)
    assert len(ShardSet(place, "val", str(tmp_path / "cache"))) == 6
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(data_dir)
    remote = ShardSet(place, "val", str(tmp_path / "cache"))
    assert remote.read(399) == ShardSet(data_dir, "val").read(399)


def test_remote_errors_are_one_line(small_dir, tmp_path):
    with pytest.raises(ConfigError, match="data.cache_dir must name a folder"):
        ShardSet("https://example.org/coco", "train")
    cache = str(tmp_path / "cache")
    with pytest.raises(DataError, match="cannot fetch pipe:cat /nowhere/index.json") as caught:
        ShardSet("pipe:cat /nowhere/{name} 2>/dev/null", "train", cache)
    assert "\n" not in str(caught.value)
    data = ShardSet(f"pipe:cat {small_dir}/{{name}}", "train", cache)
    truncate(small_dir / "train-000000.tar", 512)
    with pytest.raises(DataError, match="truncated file: pipe:cat .*train-000000.tar"):
        data.read(0)
    assert not list((tmp_path / "cache").glob("*/*.tar*")) and not list((tmp_path / "cache").rglob(".*"))
