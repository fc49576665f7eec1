"""Makes shards from raw data, or checks those there are.

python -m bt.convert source=easy_vqa out_dir=data/easy_vqa
python -m bt.convert verify=data/easy_vqa
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt.config import entry
from bt.config.schema import option
from bt.config.targets import check_target, load_target
from bt.errors import ConfigError, DataError


@dataclass
class ConvertConfig:
    """source: open node with `_target_`, chosen by source=NAME. The rest: see conf/convert.yaml."""

    source: Any = None
    raw_dir: str | None = None
    out_dir: str | None = None
    split: Any = None
    shard_size: int = option(1000, low=1)
    verify: str | None = None
    plugins: list[str] = option([])
    debug: bool = False

    def check(self) -> None:
        if (self.source is None) == (self.verify is None):
            raise ConfigError("give either source=NAME (one of conf/source/) to convert or verify=DIR to check shards")
        if self.source is not None:
            check_target(self.source, "source")


def with_progress(samples: Iterable[Any], total: int | None, what: str) -> Iterator[Any]:
    """The samples, counted by a bar on a terminal and by a line every ten seconds elsewhere."""
    from tqdm import tqdm

    # Not a terminal: a file or a pipe keeps every line, so there are few of them and no control characters.
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=" samples",
        mininterval=0.1 if terminal else 10,
        bar_format=None if terminal else "{desc}: {n_fmt}/{total_fmt} samples, {elapsed}\n",
        ascii=not terminal,
    ) as bar:
        for sample in samples:
            yield sample
            bar.update()


def run_convert(cfg: ConvertConfig) -> None:
    """Convert and print what was written, by split and by reason for what was left out."""
    from bt.data.write import convert

    arguments = {key: value for key, value in cfg.source.items() if key != "_target_"}
    source = load_target(cfg.source, "source")(**arguments)
    out_dir = Path(cfg.out_dir or f"data/{source.name}").expanduser()
    index, written = convert(
        source, out_dir, cfg.shard_size, lambda samples: with_progress(samples, source.count(), source.name)
    )
    print(f"{'written to' if written else 'already complete:'} {out_dir}")
    for split, shards in index.splits.items():
        texts = ", ".join(f"{number:,} {name}" for name, number in index.texts(split).items())
        size = sum(shard.bytes for shard in shards) / 1e6
        print(f"  {split}: {index.samples(split):,} samples, {texts}, {len(shards)} shards, {size:,.1f} MB")
    for reason, number in index.skipped.items():
        print(f"  left out: {reason}: {number:,}")


def run_verify(place: str) -> None:
    """Print every fault; DataError if there is one."""
    from bt.data.verify import verify

    faults = verify(place)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise DataError(f"{place}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
    print(f"{place}: all shards and tables are as the index says")


@entry("convert", ConvertConfig)
def main(cfg: ConvertConfig) -> None:
    if cfg.verify is not None:
        run_verify(cfg.verify)
    else:
        run_convert(cfg)


if __name__ == "__main__":
    main()
