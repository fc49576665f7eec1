"""Makes shards from raw data, or checks or shows those there are.

python -m bt.convert source=easy_vqa out_dir=data/easy_vqa
python -m bt.convert verify=data/easy_vqa
python -m bt.convert inspect=data/easy_vqa
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.config import entry
from bt.config.schema import option
from bt.config.targets import check_target, load_target
from bt.data.index import Index
from bt.data.rules import CaptionRules, ImageRules
from bt.errors import ConfigError, DataError


@dataclass
class ConvertConfig:
    """source: open node with `_target_`, chosen by source=NAME. The rest: see conf/convert.yaml."""

    source: Any = None
    raw_dir: str | None = None
    out_dir: str | None = None
    split: Any = None
    shard_size: int = option(1000, low=1)
    workers: int = option(2, low=0)
    on_bad_sample: str = option("skip", choices=["skip", "fail"])
    max_bad_share: float = option(0.9, low=0, high=1)
    captions: CaptionRules = field(default_factory=CaptionRules)
    images: ImageRules = field(default_factory=ImageRules)
    verify: str | None = None
    inspect: str | None = None
    inspect_out: str | None = None
    plugins: list[str] = option([])
    debug: bool = False

    def check(self) -> None:
        if [self.source, self.verify, self.inspect].count(None) != 2:
            raise ConfigError(
                "give either source=NAME (one of conf/source/) to convert, verify=DIR to check shards or inspect=DIR "
                "to see what they hold"
            )
        if self.source is not None:
            check_target(self.source, "source")
        low, high = self.captions.min_words, self.captions.max_words
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"captions.min_words={low} is more than captions.max_words={high}: no caption would be left"
            )


def with_progress(things: Iterable[Any], total: int | None, what: str, unit: str = "samples") -> Iterator[Any]:
    """The samples or whatever, counted by a bar on a terminal and by a line every ten seconds elsewhere."""
    from tqdm import tqdm

    # Not a terminal: a file or a pipe keeps every line, so there are few of them and no control characters.
    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        mininterval=0.1 if terminal else 10,
        bar_format=None if terminal else f"{{desc}}: {{n_fmt}}/{{total_fmt}} {unit}, {{elapsed}}\n",
        ascii=not terminal,
    ) as bar:
        for thing in things:
            yield thing
            bar.update()


def run_convert(cfg: ConvertConfig) -> None:
    """Convert and print what was written, by split and by reason for what was left out."""
    from bt.data.write import Limits, convert

    arguments = {key: value for key, value in cfg.source.items() if key != "_target_"}
    source = load_target(cfg.source, "source")(**arguments)
    out_dir = Path(cfg.out_dir or f"data/{source.name}").expanduser()
    index, written = convert(
        source,
        out_dir,
        cfg.shard_size,
        lambda samples: with_progress(samples, source.count(), source.name),
        workers=cfg.workers,
        captions=cfg.captions,
        images=cfg.images,
        limits=Limits(cfg.on_bad_sample, cfg.max_bad_share),
    )
    print(f"{'written to' if written else 'already complete:'} {out_dir}")
    for split in index.splits:
        print(f"  {describe(index, split)}")
    for reason, number in index.skipped.items():
        print(f"  left out: {reason}: {number:,}")


def describe(index: Index, split: str) -> str:
    """One line on a split: "train: 54 samples, 170 captions, 520 questions, 3 shards, 0.1 MB"."""
    shards = index.splits[split]
    texts = "".join(f"{number:,} {name}, " for name, number in index.texts(split).items())
    size = sum(shard.bytes for shard in shards) / 1e6
    return f"{split}: {index.samples(split):,} samples, {texts}{len(shards)} shards, {size:,.1f} MB"


def run_verify(place: str) -> None:
    """Print every fault; DataError if there is one."""
    from bt.data.verify import verify

    faults = verify(place, lambda shards: with_progress(shards, len(shards), "verify", "shards"))
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise DataError(f"{place}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
    print(f"{place}: all shards and tables are as the index says")


def run_inspect(place: str, sheet: str | None) -> None:
    """Print what a data set holds and write a picture of some samples."""
    from bt.data.inspect import contact_sheet, inspect

    index, lines = inspect(place)
    print(f"{place}: {index.source}, {sum(map(index.samples, index.splits)):,} samples")
    for split in index.splits:
        print(f"  {describe(index, split)}")
        for line in lines[split]:
            print(f"    {line}")
    for reason, number in index.skipped.items():
        print(f"  left out: {reason}: {number:,}")
    path = Path(sheet).expanduser() if sheet else Path(f"{Path(place).expanduser().resolve()}-samples.png")
    contact_sheet(place, path)
    print(f"written to {path}")


@entry("convert", ConvertConfig)
def main(cfg: ConvertConfig) -> None:
    if cfg.verify is not None:
        run_verify(cfg.verify)
    elif cfg.inspect is not None:
        run_inspect(cfg.inspect, cfg.inspect_out)
    else:
        run_convert(cfg)


if __name__ == "__main__":
    main()
