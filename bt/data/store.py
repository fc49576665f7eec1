"""Where the files of a data set lie: a folder, or a URL that is read into a local cache."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import uuid
from pathlib import Path

from bt.errors import ConfigError, DataError


class Store:
    """Files of one data set by name.

    place: a folder; a URL that webdataset's `gopen` reads (http and https by curl, gs by gsutil ...), or s3://, which
    it would not, by the command aws; or a command such as `pipe:ssh host cat /coco/{name}`. What is remote is fetched
    whole into `cache_dir` when it is first read and stays there; a data set that changes at its source gets a new
    folder in the cache.
    """

    def __init__(self, place: str, cache_dir: str | None = None):
        self.place = str(place)
        self.remote = "://" in self.place or self.place.startswith("pipe:")
        if self.remote and not cache_dir:
            raise ConfigError(f"data.cache_dir must name a folder, because data.dir is remote: {self.place}")
        self.cache_dir = Path(cache_dir).expanduser() if self.remote else None
        self.folder = None if self.remote else Path(self.place).expanduser()

    def read_index(self, name: str) -> str:
        """The text of the index, never from the cache."""
        if not self.remote:
            path = self.folder / name
            try:
                return path.read_text(encoding="utf-8")
            except FileNotFoundError:
                raise DataError(
                    f"no data set in {self.place}: {path} is missing (python -m bt.convert makes it)"
                ) from None
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {path}: {error}") from None
        temporary = self.cache_dir / _temporary(name)
        self._fetch(name, temporary)
        text = temporary.read_text(encoding="utf-8", errors="replace")
        temporary.unlink()
        self.folder = self.cache_dir / hashlib.sha256((self.place + text).encode()).hexdigest()[:16]
        return text

    def path(self, name: str, size: int) -> Path:
        """The local path of a file that must have `size` bytes; fetched first if it is remote and not yet here."""
        path = self.folder / name
        if self.remote and not (path.exists() and path.stat().st_size == size):
            # Workers may fetch the same file at once: each writes its own and the last rename wins.
            temporary = path.with_name(_temporary(name))
            try:
                self._fetch(name, temporary)
                _check_size(temporary, size, self._url(name))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        _check_size(path, size, str(path))
        return path

    def _url(self, name: str) -> str:
        if "{name}" in self.place:
            return self.place.replace("{name}", name)
        return f"{self.place.rstrip('/')}/{name}"

    def _fetch(self, name: str, target: Path) -> None:
        from webdataset.gopen import gopen  # it imports torch, which takes seconds and is not needed for local data

        url = self._url(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with gopen(_readable(url), "rb") as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        except (OSError, ValueError, EOFError) as error:
            target.unlink(missing_ok=True)
            raise DataError(f"cannot fetch {url}: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _readable(url: str) -> str:
    """What `gopen` takes for a URL."""
    return f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url


def _temporary(name: str) -> str:
    """A name that no other process has, not even on another machine that shares the cache."""
    return f".{name}.{uuid.uuid4().hex}"


def _check_size(path: Path, size: int, name: str) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise DataError(f"missing file: {name} is named in the index but is not there") from None
    if found < size:
        raise DataError(f"truncated file: {name} has {found} bytes, the index says {size}")
    if found > size:
        raise DataError(f"{name} differs from the index: it has {found} bytes, the index says {size}")
