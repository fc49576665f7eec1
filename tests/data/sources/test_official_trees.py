"""Every source from a small official tree of real pictures to batches, held against the raw files themselves."""

import csv
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bt.data.collate import BatchMaker
from bt.data.dataset import eval_loader
from bt.data.plan import EvalPlan, PairIndex
from bt.data.shards import ShardSet
from bt.data.sources.glue import TASKS
from bt.data.text import train_tokenizer
from bt.data.transforms import make_transform
from bt.data.write import convert
from bt.samples.easy_vqa import easy_vqa
from bt.samples.offline import source_of
from bt.samples.trees import write_tree

HOME = "mscoco_flickr30k_vqav2_snli_ve"
FIELDS = {
    "vqav2": "questions",
    "vgqa": "questions",
    "image_folder_csv": "questions",
    "nlvr2": "statements",
    "snli_ve": "hypotheses",
    "cifar10": None,
    "cifar100": None,
} | {f"glue_{task}": "sentences" for task in TASKS}
NAMES = ("coco_karpathy", "flickr30k_karpathy", "visual_genome", "sbu", "cc3m", *FIELDS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The raw tree of a source, 48 pictures of easy-VQA; made once."""
    made, collection, root = {}, easy_vqa(48), tmp_path_factory.mktemp("trees")

    def of(name: str) -> Path:
        name = name.partition("_")[0] if name.startswith("glue_") else name
        if name not in made:
            made[name] = write_tree(name, collection, root / name)
        return made[name]

    return of


def load(path: Path):
    return json.loads(path.read_text())


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# What each format says, read plainly: for a split, in order, (images, text, what is known of the pair).


def coco_karpathy(raw: Path, split: str):
    for entry in load(raw / "karpathy/dataset_coco.json")["images"]:
        if entry["split"] == split:
            image = pixels(raw / entry["filepath"] / entry["filename"])
            yield from (([image], sentence["raw"], {}) for sentence in entry["sentences"])


def flickr30k_karpathy(raw: Path, split: str):
    for entry in load(raw / "karpathy/dataset_flickr30k.json")["images"]:
        if entry["split"] == split:
            image = pixels(raw / "flickr30k-images" / entry["filename"])
            yield from (([image], sentence["raw"], {}) for sentence in entry["sentences"])


def vg_image(vg: Path, number: int) -> np.ndarray:
    (path,) = vg.glob(f"images/*/{number}.jpg")
    return pixels(path)


def karpathy_ids(vg: Path, split: str) -> set[int]:
    return {int(line.split()[1]) for line in lines(vg / f"coco_splits/karpathy_{split}_images.txt")}


def visual_genome(raw: Path, split: str):
    held_out = karpathy_ids(raw, "val") | karpathy_ids(raw, "test")
    for entry in load(raw / "annotations/region_descriptions.json"):
        if entry["id"] not in held_out:
            yield from (([vg_image(raw, entry["id"])], region["phrase"], {}) for region in entry["regions"])


def sbu(raw: Path, split: str):
    data = load(raw / "sbu-captions-all.json")
    for url, caption in zip(data["image_urls"], data["captions"], strict=True):
        yield [pixels(raw / "SBU" / url.split("/")[-1])], caption, {}


def cc3m(raw: Path, split: str):
    table = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}[split]
    for number, line in enumerate(lines(raw / "utils" / table)):
        yield [pixels(raw / f"{split}_image/{number}.jpg")], line.split("\t")[0], {}


def spelt(answer: str) -> str:
    """As the official rule has it for the answers of this tree."""
    return answer.lower().rstrip(".")


def vqa_classes(root: Path) -> list[str]:
    both = [load(root / HOME / f"vqav2/v2_mscoco_{part}_annotations.json") for part in ("train2014", "val2014")]
    counts = Counter(spelt(a["multiple_choice_answer"]) for data in both for a in data["annotations"])
    return [answer for answer, number in counts.items() if number >= 9]


def vqav2(raw: Path, split: str):
    part = {"train": "train2014", "val": "val2014"}.get(split, "test2015")
    listed = "test-dev2015" if split == "test-dev" else part
    folder, known = raw / HOME / "vqav2", vqa_classes(raw)
    given = {}
    if split in ("train", "val"):
        annotations = load(folder / f"v2_mscoco_{part}_annotations.json")["annotations"]
        given = {annotation["question_id"]: annotation for annotation in annotations}
    for question in load(folder / f"v2_OpenEnded_mscoco_{listed}_questions.json")["questions"]:
        entry = {"id": question["question_id"], "answers": {}}
        if given:
            said = [answer["answer"] for answer in given[question["question_id"]]["answers"]]
            counts = Counter(map(spelt, said))
            scores = {a: min(1.0, round(0.3 * n, 1)) for a, n in counts.items() if a in known}
            if not scores:
                continue
            kind = given[question["question_id"]]["answer_type"]
            entry |= {"answers": scores, "raw_answers": said, "type": kind}
        image = pixels(raw / HOME / part / f"COCO_{part}_{question['image_id']:012d}.jpg")
        yield [image], question["question"], entry


def vgqa(raw: Path, split: str):
    train, known = karpathy_ids(raw / "vg", "train"), vqa_classes(raw)
    for entry in load(raw / "vg/annotations/question_answers.json"):
        kept = [qa for qa in entry["qas"] if spelt(qa["answer"]) in known]
        if (entry["id"] in train) == (split == "train"):
            for qa in kept:
                info = {"id": qa["qa_id"], "answers": {spelt(qa["answer"]): 1.0}}
                yield [vg_image(raw / "vg", entry["id"])], qa["question"], info


def nlvr2(raw: Path, split: str):
    for line in map(json.loads, lines(raw / f"nlvr/nlvr2/data/{split}.json")):
        folder = raw / "nlvr" / (f"images/train/{line['directory']}" if split == "train" else split)
        pair = line["identifier"].rsplit("-", 1)[0]
        images = [pixels(folder / f"{pair}-img{side}.png") for side in (0, 1)]
        yield images, line["sentence"], {"id": line["identifier"], "label": int(line["label"] == "True")}


def snli_ve(raw: Path, split: str):
    classes = ["contradiction", "neutral", "entailment"]
    for line in map(json.loads, lines(raw / HOME / f"snli_ve/snli_ve_{split}.jsonl")):
        image = pixels(raw / HOME / f"flickr30k-images/{line['Flickr30K_ID']}.jpg")
        yield [image], line["sentence2"], {"id": line["pairID"], "label": classes.index(line["gold_label"])}


def cifar(folder: Path, files: list[str], key: bytes):
    for file in files:
        batch = pickle.loads((folder / file).read_bytes(), encoding="bytes")  # our own tree
        for row, label in zip(batch[b"data"], batch[key], strict=True):
            yield [row.reshape(3, 32, 32).transpose(1, 2, 0)], None, {"label": label}


def cifar10(raw: Path, split: str):
    files = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
    yield from cifar(raw / "cifar-10-batches-py", files, b"labels")


def cifar100(raw: Path, split: str):
    yield from cifar(raw / "cifar-100-python", [split], b"fine_labels")


# Column of the first text, of the second, of the label, and the labels in order; the label is the last column but in
# CoLA and MRPC.
GLUE = {
    "cola": (3, None, 1, ["0", "1"]),
    "sst2": (0, None, 1, ["0", "1"]),
    "mrpc": (3, 4, 0, ["0", "1"]),
    "stsb": (7, 8, 9, None),
    "qqp": (3, 4, 5, ["0", "1"]),
    "mnli": (8, 9, 11, ["entailment", "neutral", "contradiction"]),
    "qnli": (1, 2, 3, ["entailment", "not_entailment"]),
    "rte": (1, 2, 3, ["entailment", "not_entailment"]),
}
# In test files columns are others for some tasks.
GLUE_TEST = {"cola": (1, None), "sst2": (1, None), "qqp": (1, 2)}


def glue(raw: Path, split: str, task: str):
    first, second, label, classes = GLUE[task]
    if split.startswith("test"):
        first, second = GLUE_TEST.get(task, (first, second))
    rows = lines(raw / TASKS[task].folder / f"{split}.tsv")[0 if task == "cola" and split != "test" else 1 :]
    for number, row in enumerate(line.split("\t") for line in rows):
        info = {"id": number}
        if not split.startswith("test"):
            info["label"] = float(row[label]) if classes is None else classes.index(row[label])
        yield [], row[first] if second is None else (row[first], row[second]), info


def image_folder_csv(raw: Path, split: str):
    with open(raw / "pictures.csv", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if row["split"] == split:
                yield [pixels(raw / row["image"])], row["question"], {"id": number, "answers": {row["answer"]: 1.0}}


def read(name: str, raw: Path, split: str) -> list:
    found = glue(raw, split, name.removeprefix("glue_")) if name.startswith("glue_") else globals()[name](raw, split)
    return list(found)


def batches_of(out: Path, split: str, field: str | None, size: int):
    shards = ShardSet(out, split)
    index = PairIndex(shards.counts(field))
    tokenizer = train_tokenizer(shards.all_texts() if field else ["none"])
    maker = BatchMaker(
        shards, index, text_field=field, tokenizer=tokenizer, transform=make_transform("clip", size), seed=0
    )
    return shards, tokenizer, list(eval_loader(EvalPlan(index, seed=0, batch=37), maker))


@pytest.mark.parametrize("name", NAMES)
def test_batches_hold_what_the_raw_files_say(name, tree, tmp_path):
    """Every pair of every split, in the order of the files: pixels, tokens, answers, labels."""
    raw, field = tree(name), FIELDS.get(name, "captions")
    index, _ = convert(source_of(name, raw), tmp_path / "out", shard_size=10)
    for split in index.splits:
        shards, tokenizer, batches = batches_of(tmp_path / "out", split, field, 32 if "cifar" in name else 64)
        pairs = [(batch, *pair) for batch in batches for pair in enumerate(batch.pairs.tolist())]
        expected = read(name, raw, split)
        assert len(pairs) == len(expected) >= 3
        for (batch, row, (image, text)), (images, words, known) in zip(pairs, expected, strict=True):
            second = [] if batch.second_images is None else [int(batch.second_images[row])]
            shown = [batch.images[n].permute(1, 2, 0).numpy() for n in ([image] if images else []) + second]
            assert len(shown) == len(images) and all(map(np.array_equal, shown, images))
            entry = batch.entries[row]
            if field is not None:
                assert batch.texts.ids[text][batch.texts.mask[text]].tolist() == tokenizer.encode([words], 50)[0]
            if field == "captions":
                assert entry == {"text": words}
            else:
                assert known.items() <= entry.items() and ("label" in known) == ("label" in entry)
            assert all(answer in shards.labels["answers"] for answer in entry.get("answers", ()))
        if name in ("vqav2", "vgqa"):
            assert shards.labels["answers"] == vqa_classes(raw)


HOMES = {"coco_karpathy": HOME, "flickr30k_karpathy": HOME, "visual_genome": "vg", "sbu": "sbu", "cc3m": "cc"}


@pytest.mark.parametrize("name", HOMES)
def test_the_root_of_the_official_tree_may_be_given(name, tree, tmp_path):
    shutil.copytree(tree(name), tmp_path / "root" / HOMES[name])
    inner, _ = convert(source_of(name, tree(name)), tmp_path / "one")
    outer, _ = convert(source_of(name, tmp_path / "root"), tmp_path / "two")
    assert inner == outer and inner.samples("train") >= 20


@pytest.mark.parametrize("name", ["vqav2", "snli_ve"])
def test_meters_layout(name, tree, tmp_path):
    """Lists beside the folders of images; SNLI-VE's images in Flickr30K/images."""
    raw = tmp_path / "raw"
    shutil.copytree(tree(name) / HOME, raw)
    inner = raw / ("vqav2" if name == "vqav2" else "snli_ve")
    for path in inner.iterdir():
        path.rename(raw / path.name)
    inner.rmdir()
    if name == "snli_ve":
        (raw / "Flickr30K").mkdir()
        (raw / "flickr30k-images").rename(raw / "Flickr30K/images")
    official, _ = convert(source_of(name, tree(name)), tmp_path / "one")
    meters, _ = convert(source_of(name, raw), tmp_path / "two")
    assert official == meters and official.samples("train") >= 16
