"""Raw trees in the official formats out of pictures of packages, and the commands that convert them.

python -m bt.samples easy_vqa --out data/samples
python -m bt.samples icons --out data/samples --source nlvr2 vqav2 --limit 6000
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from bt.config.entry import one_line
from bt.data.sources.glue import TASKS
from bt.errors import UserError
from bt.samples.collection import Collection
from bt.samples.easy_vqa import easy_vqa
from bt.samples.icons import icons
from bt.samples.trees import TREES, write_tree


def commands(source: str, raw_dir: Path, out: Path) -> list[str]:
    """What turns a raw tree into shards; GLUE takes a command a task."""
    start = f"python -m bt.convert source={source} raw_dir={shlex.quote(str(raw_dir))}"
    if source == "glue":
        return [f"{start} source.task={task} out_dir={shlex.quote(str(out / f'glue_{task}'))}" for task in TASKS]
    return [f"{start} out_dir={shlex.quote(str(out / source))}"]


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bt.samples", description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", choices=["easy_vqa", "icons"], help="icons are fetched by npm, once (29 MB)")
    parser.add_argument("--out", type=Path, required=True, help="raw trees go to OUT/raw/SOURCE")
    parser.add_argument(
        "--source", nargs="+", choices=list(TREES), default=list(TREES), metavar="NAME", help="these alone, of all"
    )
    parser.add_argument("--limit", type=int, help="pictures in all (default: 3,000 icons, all of easy-VQA)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept (default: ~/.cache/bt/samples)")
    arguments = parser.parse_args(given)
    if arguments.limit is not None and arguments.limit < 6:
        parser.error("--limit must be at least 6")
    return arguments


def _collection(arguments: argparse.Namespace) -> Collection:
    if arguments.pictures == "icons":
        return icons(arguments.limit, arguments.seed, arguments.cache)
    return easy_vqa(arguments.limit, arguments.seed)


def main(given: list[str] | None = None) -> None:
    arguments = _arguments(given)
    try:
        collection = _collection(arguments)
        for source in arguments.source:
            raw_dir = write_tree(source, collection, arguments.out / "raw" / source, arguments.seed)
            print("\n".join(commands(source, raw_dir, arguments.out)), flush=True)
    except (UserError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
