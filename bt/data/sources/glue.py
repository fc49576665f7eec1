"""GLUE: eight tasks on sentences and pairs of sentences (gluebenchmark.com; official run_glue.py).

Raw files, as the benchmark's zip files unpack; raw_dir is the folder that holds these or the one of the task:

    {CoLA,SST-2,MRPC,STS-B,QQP,QNLI,RTE}/{train,dev,test}.tsv
    MNLI/train.tsv, {dev,test}_{matched,mismatched}.tsv

or for MRPC, of which those are often not handed on:

    MRPC/msr_paraphrase_{train,test}.txt, dev_ids.tsv

Fields are separated by tabs and never quoted. The first line names the columns, except in CoLA's train and dev.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bt.data.sources.base import RawSample, Source
from bt.data.sources.raw import ignore, inside, need, text_lines
from bt.errors import ConfigError, DataError


class Task(NamedTuple):
    """texts: columns of the sentence or the two. label: its column. classes: as the label is written -> name, in the
    order of the class numbers; None: the label is a number."""

    folder: str
    texts: tuple[str, ...]
    label: str
    classes: dict[str, str] | None


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", {"0": "unacceptable", "1": "acceptable"}),
    "sst2": Task("SST-2", ("sentence",), "label", {"0": "negative", "1": "positive"}),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", {"0": "not_equivalent", "1": "equivalent"}),
    "stsb": Task("STS-B", _PAIR, "score", None),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", {"0": "not_duplicate", "1": "duplicate"}),
    "mnli": Task("MNLI", _PAIR, "gold_label", _same("entailment", "neutral", "contradiction")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", _same("entailment", "not_entailment")),
    "rte": Task("RTE", _PAIR, "label", _same("entailment", "not_entailment")),
}
_COLA = ["source", "label", "author", "sentence"]  # what the columns without names are


@dataclass
class GLUE(Source):
    """task: cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte; upper case and dashes may be given.

    A sample is a line with one entry in `sentences`: `text`, `text_pair` where the task has two, and `label`: the class
    number, or for STS-B the score from 0 to 5; test splits have none, since their labels are not public. `id` is the
    line's number, from 0 after the names of the columns, which is the index that the benchmark's submissions use.
    `part` is "matched" or "mismatched" in MNLI's dev and test, so that an evaluation of both can tell them apart. Left
    out and counted: a line with too few or too many fields, as QQP has, and one with an unknown label.
    """

    splits = ("train", "dev", "dev_matched", "dev_mismatched", "test", "test_matched", "test_mismatched")

    task: str | None = None
    name: str = field(init=False, default="glue")
    text_fields: dict = field(init=False, default_factory=lambda: {"sentences": "text"})

    def __post_init__(self):
        super().__post_init__()
        self.task = (self.task or "").lower().replace("-", "")
        if self.task not in TASKS:
            raise ConfigError(f"source.task={self.task or 'null'}: give one of {', '.join(TASKS)}")
        self.name = f"glue_{self.task}"
        for split in self.split or ():
            if split not in self._splits():
                raise ConfigError(f"split={split}: {self.task} has {', '.join(self._splits())}")

    def labels(self) -> dict[str, list[str]]:
        classes = TASKS[self.task].classes
        return {} if classes is None else {"classes": list(classes.values())}

    def count(self) -> int:
        """Lines: at most so many samples."""
        wanted = [split for split in self._splits() if self.wants(split)]
        return sum(1 for split in wanted for _ in self._rows(split, self._file(split), ignore))

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        wanted = [split for split in self._splits() if self.wants(split)]
        files = {split: self._file(split) for split in wanted}
        need(*files.values())
        for split, path in files.items():
            for number, row in self._rows(split, path, skip):
                entry = self._entry(number, row, split)
                if entry is None:
                    skip("unknown label")
                else:
                    yield RawSample(split, f"{split}-{number:06d}", {}, {"sentences": [entry]})

    def _splits(self) -> list[str]:
        parts = ("dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
        return [split for split in self.splits if split == "train" or (split in parts) == (self.task == "mnli")]

    def _folder(self) -> Path:
        return inside(self.path(), TASKS[self.task].folder, "*train.t??")

    def _file(self, split: str) -> Path:
        path = self._folder() / f"{split}.tsv"
        whole = self._folder() / f"msr_paraphrase_{'test' if split == 'test' else 'train'}.txt"
        return whole if self.task == "mrpc" and whole.is_file() and not path.is_file() else path

    def _rows(self, split: str, path: Path, skip: Callable[[str], None]) -> Iterator[tuple[int, dict[str, str]]]:
        """Line number and line by column."""
        lines = text_lines(path, skip)
        names, first = (_COLA, 0) if self.task == "cola" and split != "test" else (None, 1)
        task = TASKS[self.task]
        needed = {*task.texts} | (set() if split.startswith("test") else {task.label})
        held_out = self._held_out(skip) if path.suffix == ".txt" and split != "test" else None
        for number, line in lines:
            fields = line.split("\t")
            if names is None:
                names = fields
                if missing := sorted(needed - set(names)):
                    raise DataError(f"{path}: its first line names no column {missing[0]!r}")
            elif line and len(fields) != len(names):
                skip("line with another number of fields")
            elif line:
                row = dict(zip(names, fields, strict=True))
                if held_out is None or ((row["#1 ID"], row["#2 ID"]) in held_out) == (split == "dev"):
                    yield number - first, row

    def _held_out(self, skip: Callable[[str], None]) -> set[tuple[str, ...]]:
        """The pairs of MRPC's training file that make dev."""
        path = self._folder() / "dev_ids.tsv"
        need(path)
        return {tuple(line.strip().split("\t")) for _, line in text_lines(path, skip)}

    def _entry(self, number: int, row: dict[str, str], split: str) -> dict[str, Any] | None:
        """None if the label is unknown."""
        task = TASKS[self.task]
        entry: dict[str, Any] = {"id": number}
        entry |= dict(zip(("text", "text_pair"), (row[name] for name in task.texts), strict=False))
        kind, _, part = split.partition("_")
        if part:
            entry["part"] = part
        if kind == "test":
            return entry
        written = row[task.label]
        try:
            label = float(written) if task.classes is None else list(task.classes).index(written)
        except ValueError:
            return None
        return entry | {"label": label} if 0 <= label <= 5 else None
