"""Asks a trained model about pictures.

python -m bt.predict --run-dir runs/vqa --image a.jpg --text "what colour is it?"
python -m bt.predict --run-dir runs/pre --image a.jpg --text "a red [MASK]"           fills the mask
python -m bt.predict --run-dir runs/pre --image a.jpg --text "a red circle"           how well they match
python -m bt.predict --run-dir runs/nlvr2 --image a.jpg b.jpg --text "both are red"
python -m bt.predict --run-dir runs/vqa --input questions.csv --out answers.jsonl

--input is a CSV or JSONL file with the columns image (a path from the file's folder on), text (or question, caption,
sentence, hypothesis) and, for two pictures, image2; or a folder of shards. Each of its rows becomes a line of --out
with all that it had; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bt.config.entry import one_line
from bt.errors import ConfigError, UserError

if TYPE_CHECKING:
    from bt.inference.predictor import Predictor

TASKS = ("answer", "match", "fill_mask", "compare", "entails")


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bt.predict", description=__doc__, formatter_class=shown)
    add_model(parser)
    one = parser.add_argument_group("one question")
    one.add_argument("--image", nargs="+", type=Path, metavar="FILE", help="a picture; two for --task compare")
    one.add_argument("--text", help="question, caption, statement, or a text with [MASK]")
    one.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    many = parser.add_argument_group("many")
    many.add_argument("--input", type=Path, metavar="FILE", help="NAME.csv, NAME.jsonl or a folder of shards")
    many.add_argument("--out", type=Path, metavar="FILE", help="JSONL file to write")
    many.add_argument("--images", type=Path, metavar="DIR", help="where paths in --input start (default: its folder)")
    many.add_argument("--split", default="test", help="of shards (default: test)")
    many.add_argument("--texts", metavar="FIELD", help="which texts of shards: captions, questions, ...")
    many.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help="skip: a bad row gets an error line")
    many.add_argument("--workers", type=int, default=2, help="threads that read pictures (default: 2)")
    parser.add_argument("--task", choices=TASKS, help="what to ask (default: what the model was trained for)")
    parser.add_argument("--by", choices=("itm", "rank", "itc"), help="how to match (default: the best there is)")
    parser.add_argument("--top", type=int, default=5, help="so many answers or words (default: 5)")
    found = parser.parse_args(given)
    if (found.input is None) == (found.image is None):
        parser.error("give either --image and --text, or --input and --out")
    if found.image and (not found.text or len(found.image) > 2):
        parser.error("--image takes one or two pictures, and needs a --text that is not empty")
    if found.input and not found.out:
        parser.error("--input needs --out")
    if min(found.top, found.workers, found.batch) < 1:
        parser.error("--top, --workers and --batch must be at least 1")
    return found


def add_model(parser: argparse.ArgumentParser, batch: int = 32) -> None:
    """The options that say which model, and where it runs."""
    parser.add_argument("--run-dir", required=True, metavar="PATH", help="run, checkpoint, or what else bt.load reads")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, folder or name, where PATH has none")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of forward passes")
    parser.add_argument("--batch", type=int, default=batch, help=f"inputs in a forward pass (default: {batch})")


def task_of(model: Predictor, found: argparse.Namespace, text: str | None) -> str:
    """What is asked, with an error for an option that it has no use for."""
    from bt.predict.questions import guess_task

    task = found.task or guess_task(model, text)
    if found.by and task != "match":
        raise ConfigError(f"--by is for --task match, and this is {task}")
    return task


def one(model: Predictor, found: argparse.Namespace) -> None:
    from bt.engine.progress import table
    from bt.predict.questions import ask
    from bt.predict.rows import Row

    task = task_of(model, found, found.text)
    if len(found.image) == 2 and task != "compare":
        raise ConfigError(f"--image has two pictures, which --task {task} does not take")
    row = Row(found.image[0], found.text, *found.image[1:])
    (result,) = ask(model, task, top=found.top, by=found.by)([row])
    if found.json:
        print(json.dumps({"task": task, **result}, ensure_ascii=False))
    elif task == "match":
        print(f"{result['score']:.4f}  ({result['by']})")
    else:
        groups = result.get("masks") or [result.get("answers") or result["labels"]]
        print("\n\n".join(table([tuple(choice.values()) for choice in group], tuple(group[0])) for group in groups))


def many(model: Predictor, found: argparse.Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from bt.predict.batch import Partial, predict_all
    from bt.predict.questions import ask
    from bt.predict.rows import read_table
    from bt.tasks.retrieval import fingerprint

    field = found.texts or model.loaded.config.task.texts
    table = read_table(found.input, found.images, found.split, field)
    first = next(table.rows(), None)
    task = task_of(model, found, first and first.text)
    file = found.input / "index.json" if found.input.is_dir() else found.input
    about = [str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size]
    # Not --on-bad: lines that one of its values has written are those of the other.
    options = [task, found.top, found.by, found.dtype, str(found.images), found.split, field]
    partial = Partial(found.out, [fingerprint(model.model), about, options])
    if partial.done:
        print(f"going on behind {partial.done:,} of {table.total:,} rows", flush=True)
    try:
        with ThreadPoolExecutor(found.workers) as pool:
            asked = ask(model, task, top=found.top, by=found.by, pool=pool)
            counts = predict_all(table, asked, partial, batch=found.batch, skip_bad=found.on_bad == "skip")
    finally:
        partial.close()
    bad = f", {counts['errors']:,} of them errors" if counts["errors"] else ""
    print(f"{task}: {counts.total():,} rows{bad}; {found.out}")


def main(given: list[str] | None = None) -> None:
    found = arguments_of(given)
    import bt

    try:
        model = bt.load(found.run_dir, found.device, found.dtype, found.batch, tokenizer=found.tokenizer)
        (one if found.image else many)(model, found)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
