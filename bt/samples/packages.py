"""Files of npm packages: fetched once by npm itself, which checks them against the registry's integrity hashes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from bt.errors import DataError

_MINUTES = 10


def cache_dir() -> Path:
    """Where packages are kept if nothing else is said: $XDG_CACHE_HOME/bt/samples or ~/.cache/bt/samples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bt" / "samples"


def fetch(package: str, version: str, files: Iterable[str], cache: Path | None = None) -> Path:
    """The folder of a package's files in the cache, with `files` (paths in the package) if they are there before.

    Comes from the registry that npm is configured for. DataError in one line if npm is missing or fails, or the package
    has not all of the files.
    """
    folder = (cache or cache_dir()) / f"{package}-{version}"
    wanted = list(files)
    if all((folder / name).is_file() for name in wanted):
        return folder
    work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        work.mkdir(parents=True)
        _unpack(_pack(f"{package}@{version}", work), wanted, work / "files")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work / "files", folder)
    except OSError as error:
        if not all((folder / name).is_file() for name in wanted):  # else another process was quicker
            raise DataError(f"cannot keep {package} in {folder.parent}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _pack(what: str, folder: Path) -> Path:
    """The package's archive, by `npm pack`."""
    if shutil.which("npm") is None:
        raise DataError(f"npm, which fetches {what}, is not installed (https://nodejs.org)")
    command = ["npm", "pack", "--loglevel=error", "--pack-destination", str(folder), what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * _MINUTES)
    except subprocess.TimeoutExpired:
        raise DataError(f"npm did not fetch {what} in {_MINUTES} minutes") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        said = [line for line in done.stderr.splitlines() if line.startswith("npm error")] or ["npm gives no reason"]
        raise DataError(f"npm could not fetch {what}: {said[0].removeprefix('npm error ')}")
    return archives[0]


def _unpack(archive: Path, files: list[str], folder: Path) -> None:
    """These files of the archive, whose names all begin with package/."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name in files and member.isfile():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise DataError(f"{archive.name} has no file {missing[0]}")
