import pytest

from bt.data.sources.glue import GLUE
from bt.errors import ConfigError, DataError
from tests.data.sources.labelled import converted, questions_of, write_lines

# Names of the columns in the benchmark's files: of train and dev, and of test.
COLUMNS = {
    "CoLA": (None, "index sentence"),
    "SST-2": ("sentence label", "index sentence"),
    "MRPC": ("Quality|#1 ID|#2 ID|#1 String|#2 String", "index|#1 ID|#2 ID|#1 String|#2 String"),
    "STS-B": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
    ),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "MNLI": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2 label1 gold_label",
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2",
    ),
    "QNLI": ("index question sentence label", "index question sentence"),
    "RTE": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}
WRITTEN = {"MNLI": ["contradiction", "entailment", "neutral"], "QNLI": ["not_entailment", "entailment"]}
WRITTEN |= {"RTE": WRITTEN["QNLI"], "STS-B": ["0.000", "3.800", "5.000"]}
FIRST = ("sentence1", "question1", "#1 String", "question", "sentence")
SECOND = ("sentence2", "question2", "#2 String", "sentence")
LABEL = ("label", "score", "is_duplicate", "Quality", "gold_label")


def split_names(names: str) -> list[str]:
    return names.split("|" if "|" in names else " ")


def pairs(count: int) -> list[tuple[str, str]]:
    """Questions with quotes, which are no quotation to a reader of these files, and the next question."""
    texts = [
        f'"{question}' if n % 3 else f'{question} "it\'s"'
        for n, (_, question, _) in enumerate(questions_of("train", range(4)))
    ]
    return list(zip(texts[:count], texts[1 : count + 1], strict=True))


def tsv(folder: str, test: bool, count: int = 6) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Lines of a file, and the texts and the label as it is written in each."""
    names = COLUMNS[folder][test]
    labels = WRITTEN.get(folder, ["1", "0"])
    rows = [(one, two, labels[n % len(labels)]) for n, (one, two) in enumerate(pairs(count))]
    if names is None:
        return [f"gj04\t{label}\t{'*' if label == '0' else ''}\t{one}" for one, _, label in rows], rows
    columns = split_names(names)
    first = next(name for name in FIRST if name in columns)
    second = next((name for name in SECOND if name in columns and name != first), "")
    lines = ["\t".join(columns)]
    for n, (one, two, label) in enumerate(rows):
        known = {first: one, second: two, **dict.fromkeys(LABEL, label)}
        lines.append("\t".join(known.get(name, f"{name}{n}") for name in columns))
    return lines, rows


def tree(root, folder):
    splits = ["train", "dev", "test"]
    if folder == "MNLI":
        splits = ["train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"]
    for split in splits:
        write_lines(root / folder / f"{split}.tsv", tsv(folder, split.startswith("test"))[0])
    return splits


CLASSES = {
    "CoLA": ["unacceptable", "acceptable"],
    "SST-2": ["negative", "positive"],
    "MRPC": ["not_equivalent", "equivalent"],
    "QQP": ["not_duplicate", "duplicate"],
    "MNLI": ["entailment", "neutral", "contradiction"],
    "QNLI": ["entailment", "not_entailment"],
    "RTE": ["entailment", "not_entailment"],
}


@pytest.mark.parametrize("folder", COLUMNS)
def test_tasks(tmp_path, folder):
    splits = tree(tmp_path, folder)
    source = GLUE(str(tmp_path), task=folder)
    assert source.name == "glue_" + folder.lower().replace("-", "") and source.count() == 6 * len(splits)
    assert source.labels() == ({"classes": CLASSES[folder]} if folder in CLASSES else {})
    samples = list(source.samples(print))
    assert [sample.split for sample in samples] == [split for split in splits for _ in range(6)]
    assert samples[7].key == f"{splits[1]}-000001" and not any(sample.images for sample in samples)
    for split in splits:
        _, rows = tsv(folder, split.startswith("test"))
        entries = [sample.info["sentences"] for sample in samples if sample.split == split]
        for number, ((entry,), (one, two, written)) in enumerate(zip(entries, rows, strict=True)):
            want = {"id": number, "text": one}
            if folder not in ("CoLA", "SST-2"):
                want["text_pair"] = two
            if folder == "MNLI" and split != "train":
                want["part"] = split.split("_")[1]
            if not split.startswith("test"):
                own = CLASSES.get(folder, ())
                number_of = {"0": 0, "1": 1} | {name: n for n, name in enumerate(own)}
                want["label"] = float(written) if folder == "STS-B" else number_of[written]
            assert entry == want


def test_shards_of_text_alone(tmp_path):
    tree(tmp_path / "raw", "QNLI")
    samples, skipped, data = converted(GLUE(str(tmp_path / "raw/QNLI"), ["dev"], task="qnli"), tmp_path / "out", "dev")
    _, rows = tsv("QNLI", False)
    assert list(data.all_texts()) == [text for one, two, _ in rows for text in (one, two)] and skipped == {}
    assert [sample.info["sentences"][0]["label"] for sample in samples.values()] == [1, 0, 1, 0, 1, 0]
    assert all(sample.images == {} for sample in samples.values())


def test_mrpc_as_its_authors_hand_it_out(tmp_path):
    """The training file is cut by the ids of dev; a byte-order mark comes first."""
    lines, rows = tsv("MRPC", False)
    whole = ["\ufeff" + lines[0], *lines[1:]]
    write_lines(tmp_path / "MRPC/msr_paraphrase_train.txt", [line + "\r" for line in whole])
    write_lines(tmp_path / "MRPC/msr_paraphrase_test.txt", [line + "\r" for line in whole[:4]])
    write_lines(tmp_path / "MRPC/dev_ids.tsv", [f"#1 ID{n}\t#2 ID{n}" for n in (1, 4)])
    samples = list(GLUE(str(tmp_path), task="mrpc").samples(print))
    found = {split: [s.info["sentences"][0] for s in samples if s.split == split] for split in ("train", "dev", "test")}
    assert [entry["text"] for entry in found["dev"]] == [rows[1][0], rows[4][0]]
    assert [entry["id"] for entry in found["train"]] == [0, 2, 3, 5]
    assert [entry["label"] for entry in found["train"]] == [1, 1, 0, 0]
    assert found["test"] == [{"id": n, "text": rows[n][0], "text_pair": rows[n][1]} for n in range(3)]


def test_broken_lines_are_counted(tmp_path):
    splits = tree(tmp_path / "raw", "QQP")
    lines, _ = tsv("QQP", False)
    good = lines[1]
    damaged = [lines[0], good.rpartition("\t")[0], good + "\tmore", good[:-1] + "2", good.encode() + b"\xff", "", good]
    write_lines(tmp_path / "raw/QQP/train.tsv", damaged)
    samples, skipped, _ = converted(GLUE(str(tmp_path / "raw"), splits[:1], task="qqp"), tmp_path / "out", "train")
    assert list(samples) == ["train-000005"]
    assert skipped == {"line is not utf-8": 1, "line with another number of fields": 2, "unknown label": 1}
    write_lines(
        tmp_path / "raw/STS-B/train.tsv", [COLUMNS["STS-B"][0].replace(" ", "\t"), "a\t" * 9 + "nan", "a\t" * 9 + "6"]
    )
    reasons = []
    assert list(GLUE(str(tmp_path / "raw"), "train", task="stsb").samples(reasons.append)) == []
    assert reasons == ["unknown label"] * 2


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="source.task=null: give one of cola, sst2, mrpc"):
        GLUE(str(tmp_path))
    with pytest.raises(ConfigError, match="split=dev: mnli has train, dev_matched, dev_mismatched, test_matched"):
        GLUE(str(tmp_path), "dev", task="MNLI")
    with pytest.raises(DataError, match="missing raw file: .*RTE/train.tsv"):
        next(GLUE(str(tmp_path), task="rte").samples(print))
    write_lines(tmp_path / "RTE/train.tsv", ["index\tsentence1\tlabel", "0\ta\tentailment"])
    with pytest.raises(DataError, match="RTE/train.tsv: its first line names no column 'sentence2'"):
        next(GLUE(str(tmp_path), "train", task="rte").samples(print))
