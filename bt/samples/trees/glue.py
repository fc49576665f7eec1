"""Raw trees of GLUE: its eight tasks' tables."""

from __future__ import annotations

from pathlib import Path

from bt.data.sources.glue import TASKS
from bt.samples.collection import Collection, Item, generator
from bt.samples.sentences import line
from bt.samples.trees.files import put_lines

_LINES = 4  # of each task and picture

# Names of the columns, as the benchmark's files have them: of train and dev, and of test. CoLA's have none but in test.
_MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2"
)
_STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
_MRPC = "#1 ID|#2 ID|#1 String|#2 String"
_COLUMNS = {
    "cola": ("source label author sentence", "index sentence"),
    "sst2": ("sentence label", "index sentence"),
    "mrpc": (f"Quality|{_MRPC}", f"index|{_MRPC}"),
    "stsb": (f"{_STSB} score", _STSB),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "mnli": (f"{_MNLI} label1 gold_label", _MNLI),
    "qnli": ("index question sentence label", "index question sentence"),
    "rte": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}


def glue(collection: Collection, raw_dir: Path, seed: int) -> None:
    """All eight tasks, dev from val. MNLI's matched parts are of the genre of train, its mismatched ones of another."""
    for task in TASKS:
        glue_task(task, collection, raw_dir, seed)


def glue_task(task: str, collection: Collection, raw_dir: Path, seed: int) -> None:
    """The files of one task."""
    for file, (items, genre) in _files(task, collection).items():
        lines = []
        for item in items:
            draw = generator("glue", task, file, seed, item.name)
            lines += [line(task, collection, item, draw, genre) for _ in range(_LINES)]
        columns = _COLUMNS[task][file.startswith("test")].replace("|", "\t").replace(" ", "\t")
        if task == "mrpc":
            columns = _COLUMNS[task][file.startswith("test")].replace("|", "\t")
        rows = [_row(task, columns.split("\t"), number, genre, found) for number, found in enumerate(lines)]
        head = [] if task == "cola" and file != "test" else [columns]
        put_lines(raw_dir / TASKS[task].folder / f"{file}.tsv", head + rows)


def _files(task: str, collection: Collection) -> dict[str, tuple[list[Item], str]]:
    """File -> the pictures that it speaks of, and its genre."""
    found = {"train": (collection.of("train"), "album")}
    for file, split in {"dev": "val", "test": "test"}.items():
        if task == "mnli":
            found[f"{file}_matched"] = (collection.of(split), "album")
            found[f"{file}_mismatched"] = (collection.of(split), "letter")
        else:
            found[file] = (collection.of(split), "album")
    return found


def _row(task: str, columns: list[str], number: int, genre: str, found: tuple[str, str | None, str]) -> str:
    """A line of the table; columns that nothing reads hold the line's number."""
    one, two, label = found
    known = dict(zip(TASKS[task].texts, (one, two), strict=False)) | {TASKS[task].label: label, "genre": genre}
    if task == "cola":
        known["author"] = "*" if label == "0" else ""
    return "\t".join(str(known.get(name, number)) for name in columns)
