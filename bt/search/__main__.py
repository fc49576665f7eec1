"""Finds pictures by what they show.

python -m bt.search index --images DIR --run-dir runs/pre --out index      encodes every picture once
python -m bt.search query "a red circle" --run-dir runs/pre --index index  prints the best, and writes hits/
python -m bt.search measure --texts FILE --run-dir runs/pre --index index  what the shortlist loses and saves

A query compares uni-modal features (ITC) with those of all pictures, and puts the --shortlist most similar ones in
order by the ITM head.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bt.config.entry import one_line
from bt.errors import DataError, UserError
from bt.predict.__main__ import add_model


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bt.search", description=__doc__, formatter_class=shown)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    index = commands.add_parser("index", help="encode the pictures of a folder")
    index.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures, in folders below, too")
    index.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the index goes")
    index.add_argument("--no-states", action="store_true", help="a small index, of which queries encode the shortlist")
    index.add_argument("--on-bad", choices=("fail", "skip"), default="skip", help="pictures that cannot be read")
    query = commands.add_parser("query", help="find pictures for a text")
    query.add_argument("text")
    query.add_argument("--out", type=Path, default=Path("hits"), metavar="DIR", help="hits.png, .html, .json go there")
    query.add_argument("--shortlist", type=int, default=128, help="pictures to re-rank (default: 128); 0: all")
    measure = commands.add_parser("measure", help="compare shortlists with re-ranking everything")
    measure.add_argument("--texts", type=Path, required=True, metavar="FILE", help="one query a line")
    measure.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="of shortlists")
    for made in (index, query, measure):
        add_model(made)
    for made in (query, measure):
        made.add_argument("--index", type=Path, required=True, metavar="DIR")
        made.add_argument("--k", type=int, default=10, help="so many hits (default: 10)")
    found = parser.parse_args(given)
    numbers = [found.batch, getattr(found, "k", 1), *getattr(found, "sizes", ())]
    if min(numbers) < 1 or getattr(found, "shortlist", 0) < 0:
        parser.error("--batch, --k and --sizes must be at least 1, --shortlist at least 0")
    return found


def main(given: list[str] | None = None) -> None:
    found = arguments_of(given)
    import bt

    try:
        model = bt.load(found.run_dir, found.device, found.dtype, found.batch, tokenizer=found.tokenizer)
        {"index": _index, "query": _query, "measure": _measure}[found.command](model, found)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except OSError as error:
        sys.exit(f"error: {error.filename or found.out}: {error.strerror}")


def _index(model, found: argparse.Namespace) -> None:
    from bt.search.index import build

    start = time.perf_counter()
    about = build(model, found.images, found.out, states=not found.no_states, skip_bad=found.on_bad == "skip")
    bad = about["bad"]
    size = sum(path.stat().st_size for path in found.out.iterdir()) / 1e6
    print(
        f"{len(about['images']) - len(bad):,} pictures in {found.out}, {size:.1f} MB, "
        f"{time.perf_counter() - start:.1f} s; {len(bad)} could not be read"
    )
    for reason in [*bad.values()][:10]:
        print(f"  {reason}")


def _searcher(model, found: argparse.Namespace):
    from bt.search.index import ImageIndex
    from bt.search.query import Searcher

    return Searcher(model, ImageIndex(found.index))


def _query(model, found: argparse.Namespace) -> None:
    from bt.engine.progress import table
    from bt.search.page import contact_sheet, page

    searcher = _searcher(model, found)
    start = time.perf_counter()
    hits = searcher.search(found.text, found.k, found.shortlist or None)
    seconds = time.perf_counter() - start
    found.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(found.text, hits, found.out / "hits.png")
    page(found.text, hits, found.out / "hits.html")
    listed = [{**vars(hit), "path": str(hit.path)} for hit in hits]
    (found.out / "hits.json").write_text(json.dumps({"text": found.text, "hits": listed}, indent=1) + "\n")
    shown = [
        (number, "-" if hit.score is None else f"{hit.score:.4f}", str(hit.path)) for number, hit in enumerate(hits, 1)
    ]
    print(table(shown, ("", "match", "picture")))
    print(f"{len(searcher.index):,} pictures, {1000 * seconds:.0f} ms; {found.out}/hits.png, hits.html, hits.json")


def _measure(model, found: argparse.Namespace) -> None:
    from bt.engine.progress import table
    from bt.search.query import measure

    try:
        texts = [line for line in found.texts.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{found.texts} cannot be read: {error.strerror}") from error
    if not texts:
        raise DataError(f"{found.texts} has no lines")
    searcher = _searcher(model, found)
    sizes = [size for size in found.sizes if size < len(searcher.index)]
    rows = measure(searcher, texts, found.k, sizes)
    shown = [(row["shortlist"], f"{row['recall']:.4f}", f"{1000 * row['seconds']:.1f}") for row in rows]
    print(f"{len(texts)} texts, {len(searcher.index):,} pictures")
    print(table(shown, ("shortlist", f"of the {found.k} best", "ms a query")))


if __name__ == "__main__":
    main()
