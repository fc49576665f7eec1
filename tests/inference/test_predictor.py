"""`bt.load`: what a run says is what its own evaluation said, alone, in lists, in threads and in half precision."""

from __future__ import annotations

import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import bt
from bt.assemble import Data, open_shards
from bt.config import read_config
from bt.data import text as tokenizers
from bt.data.shards import ShardSet
from bt.engine.distributed import World
from bt.errors import CheckpointError, ConfigError, DataError
from bt.inference.encoder import NoHead
from bt.models.bridgetower import Need

CAPTIONS = ["a red circle", "the shape is blue .", "a picture of a green triangle on white"]


def predictions(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions-test.jsonl").read_text().splitlines()]


def images_of(data: Path, split: str = "test") -> dict[str, dict[str, bytes]]:
    shards = ShardSet(str(data), split)
    return {sample.key: sample.images for sample in map(shards.read, range(len(shards)))}


@pytest.fixture(scope="module")
def pictures(smoke_runs) -> list[bytes]:
    return [images["image"] for images in images_of(smoke_runs / "data/samples/vqav2", "val").values()][:5]


def test_answers_are_those_of_the_runs_own_evaluation(smoke_runs, vqa):
    rows = predictions(smoke_runs / "runs/vqa_base")
    images = images_of(smoke_runs / "data/samples/vqav2", read_config(smoke_runs / "runs/vqa_base").data.test_split)
    given = [images[row["image"]]["image"] for row in rows]
    found = vqa.answer(given, [row["question"] for row in rows], top=3)
    assert [choices[0].name for choices in found] == [row["answer"] for row in rows] and len(rows) > 8
    assert [choices[0].probability for choices in found] == pytest.approx(
        [row["probability"] for row in rows], abs=6e-5
    )
    for choices in found:
        chances = [choice.probability for choice in choices]
        assert chances == sorted(chances, reverse=True) and len(chances) == 3
    every = vqa.answer(given[0], rows[0]["question"], top=10_000)
    assert {choice.name for choice in every} == set(vqa.answers)
    assert [choice.probability for choice in every[:3]] == pytest.approx([choice.probability for choice in found[0]])


@pytest.mark.parametrize("name, data", [("snli_ve_base", "snli_ve"), ("nlvr2_base", "nlvr2")])
def test_labels_are_those_of_the_runs_own_evaluation(smoke_runs, name, data):
    model = bt.load(smoke_runs / "runs" / name, batch=3)
    rows = predictions(smoke_runs / "runs" / name)
    images = images_of(smoke_runs / "data/samples" / data, read_config(smoke_runs / "runs" / name).data.test_split)
    texts = [row["text"] for row in rows]
    if data == "nlvr2":
        left, right = ([images[row["image"]][side] for row in rows] for side in ("left", "right"))
        found = model.compare(left, right, texts)
        # Both places count: the other way round it is another question.
        assert model.compare(right, left, texts) != found
        assert model.abilities == ["compare"]
    else:
        found = model.entails([images[row["image"]]["image"] for row in rows], texts)
        assert model.abilities == ["entails"]
    assert [labels[0].name for labels in found] == [row["prediction"] for row in rows]
    assert [labels[0].probability for labels in found] == pytest.approx([row["probability"] for row in rows], abs=6e-5)
    assert sum(choice.probability for choice in found[0]) == pytest.approx(1)


@torch.no_grad()
def test_matches_and_masked_words_are_those_of_the_objectives(smoke_runs, pretrained, monkeypatch):
    """Against a batch of the run's loader, through its own objectives."""
    monkeypatch.chdir(smoke_runs)
    cfg = read_config(smoke_runs / "runs/pretrain_base")
    cfg.data.dir, cfg.data.workers = cfg.data.samples, 0
    data = Data(cfg, World(0, 1, torch.device("cpu")), pretrained.model, pretrained.tokenizer)
    batch = next(iter(data.evaluation(cfg.data.val_split)))
    shards = open_shards(cfg.data, cfg.data.val_split, each=False)
    by_key = {sample.key: sample.images["image"] for sample in map(shards.read, range(len(shards)))}
    images, texts = batch.pairs.unbind(1)
    given = [by_key[batch.keys[row]] for row in images.tolist()]
    captions = [entry["text"] for entry in batch.entries]
    results = pretrained.model(batch)
    encoded = pretrained.tower.encode_images(pretrained.tower.vision.normalize(batch.images))
    cls = pretrained.tower.fuse(encoded, pretrained.tower.encode_texts(batch.texts), batch.pairs, Need(cls=True)).cls
    itm = pretrained.model.objectives["itm"].head(cls).softmax(1)[:, 1]
    assert pretrained.match(given, captions) == pytest.approx(itm.tolist(), abs=1e-6)
    itc = pretrained.model.objectives["itc"]
    cosine = results["itc"].outputs["image_to_text"].diagonal() * itc.temperature
    assert pretrained.match(given, captions, by="itc") == pytest.approx(cosine.tolist(), abs=1e-6)
    # One word masked in each caption.
    positions = torch.zeros_like(batch.texts.mask)
    positions[:, 2] = True
    ids = batch.texts.ids.masked_fill(positions, pretrained.tokenizer.mask_id)
    masked = [pretrained.tokenizer.backend.decode(row[1:-1].tolist(), skip_special_tokens=False) for row in ids]
    masked = [text.replace("<pad>", "").replace("</s>", "").replace("<mask>", "[MASK]") for text in masked]
    rows = texts.unique()
    texts_in = type(batch.texts)(ids, batch.texts.mask)
    pairs = torch.stack([torch.zeros_like(rows), rows], dim=1)
    fused = pretrained.tower.fuse(encoded, pretrained.tower.encode_texts(texts_in), pairs, Need(text=positions))
    expected = pretrained.model.objectives["mlm"].head(fused.text).softmax(1).max(1)
    first = by_key[batch.keys[0]]
    for text, chance, number in zip(masked, expected.values.tolist(), expected.indices.tolist(), strict=True):
        ((best, _),) = pretrained.fill_mask(first, text, top=2)
        assert (best.name, best.probability) == (pretrained.token(number), pytest.approx(chance, abs=1e-6))
    two = pretrained.fill_mask(first, "the [MASK] is <mask> .", top=1)
    assert len(two) == 2 and all(len(choices) == 1 for choices in two)


def test_lists_and_batches_change_nothing(smoke_runs, pretrained, pictures):
    """Each pair alone, all together, few at a time, encoded before, and in every form of a picture."""
    alone = [[pretrained.match(picture, text) for text in CAPTIONS] for picture in pictures]
    small = bt.load(smoke_runs / "runs/pretrain_base", batch=2)
    for model in (pretrained, small):
        every = [picture for picture in pictures for _ in CAPTIONS]
        found = model.match(every, CAPTIONS * len(pictures))
        assert found == pytest.approx(sum(alone, []), abs=1e-6)
        encoded = model.encode_images(pictures)
        assert model.match(encoded, CAPTIONS[0]) == pytest.approx([row[0] for row in alone], abs=1e-6)
        assert model.match(pictures[0], CAPTIONS) == pytest.approx(alone[0], abs=1e-6)
        assert model.match(encoded, CAPTIONS[1], by="itc") == pytest.approx(
            [model.match(picture, CAPTIONS[1], by="itc") for picture in pictures], abs=1e-6
        )
    assert len({round(score, 6) for row in alone for score in row}) > 5
    image = Image.open(io.BytesIO(pictures[1]))
    for form in (image, pretrained.preprocess(pictures[1])):
        assert pretrained.match(form, CAPTIONS[2]) == pytest.approx(alone[1][2], abs=1e-6)
    assert pretrained.match([], []) == [] and pretrained.fill_mask([], "a [MASK]") == []
    assert pretrained.match([], [], by="itc") == []


def test_threads_read_one_model(vqa, pretrained, pictures, monkeypatch):
    """Eight threads on a tokenizer whose cache is emptied all the time."""
    monkeypatch.setattr(tokenizers, "_CACHED_TEXTS", 2)
    questions = [f"is it {word} ?" for word in ("red", "blue", "a circle", "there", "left", "big", "small", "grey")]

    def ask(number: int):
        question, picture = questions[number % len(questions)], pictures[number % len(pictures)]
        return vqa.answer(picture, [question, questions[0]], top=2), pretrained.match(picture, question)

    expected = [ask(number) for number in range(40)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = [*pool.map(ask, [*range(40)] * 5)]
    finally:
        sys.setswitchinterval(interval)
    assert found == expected * 5


def test_half_precision_is_near_and_is_used(smoke_runs, pretrained, pictures):
    exact = pretrained.match(pictures, CAPTIONS[0])
    for dtype in ("bf16", torch.bfloat16):
        half = bt.load(smoke_runs / "runs/pretrain_base", dtype=dtype).match(pictures, CAPTIONS[0])
        assert half == pytest.approx(exact, abs=0.02) and half != exact


def test_loading_leaves_the_callers_draws_and_gradients_alone(smoke_runs, pictures):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = bt.load(smoke_runs / "runs/pretrain_base/checkpoints/best/model.safetensors")
    assert torch.equal(torch.get_rng_state(), before) and not model.model.training
    features = model.image_features(pictures)
    # What it gives can be trained on: a linear probe.
    probe = torch.nn.Linear(features.shape[1], 1)
    probe(features).sum().backward()
    assert torch.allclose(probe.weight.grad, features.sum(0, keepdim=True), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_what_a_run_names_of_its_data_need_not_be_there(smoke_runs, tmp_path, pictures, monkeypatch):
    run = shutil.copytree(smoke_runs / "runs/vqa_base", tmp_path / "run", symlinks=True)
    config = OmegaConf.load(run / "config.yaml")
    config.data.dir = config.tracking.uri = "${oc.env:NOT_SET_ANYWHERE}"
    OmegaConf.save(config, run / "config.yaml")
    expected = bt.load(smoke_runs / "runs/vqa_base").answer(pictures[0], "is it red ?")
    assert bt.load(run).answer(pictures[0], "is it red ?") == expected


def test_what_does_not_go_is_one_clear_line(smoke_runs, vqa, pretrained, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0][:60])
    for call, kind, said in (
        (lambda: vqa.match(pictures[0], "a"), NoHead, "has no head for matching; it can answer"),
        (lambda: pretrained.answer(pictures[0], "a"), NoHead, "has no head for answers; it can fill_mask, match"),
        (lambda: pretrained.match(pictures[0], "a", by="rank"), NoHead, "allows itm, itc"),
        (lambda: vqa.answer(pictures[0], "  "), DataError, "a text must not be empty, got '  '"),
        (lambda: vqa.answer(pictures[:2], CAPTIONS), DataError, "2 pictures and 3 texts do not make pairs"),
        (lambda: vqa.answer(pictures[0], "a", top=0), DataError, "top=0 is out of range"),
        (lambda: vqa.answer(str(broken), "a"), DataError, "broken.png cannot be decoded"),
        (lambda: vqa.answer(b"no image", "a"), DataError, "the image cannot be decoded: not an image"),
        (lambda: vqa.answer(tmp_path / "none.png", "a"), DataError, "none.png cannot be read: No such file"),
        (lambda: vqa.answer(3, "a"), DataError, "a picture is a path, bytes, a PIL image or pixels, not int"),
        (lambda: vqa.answer(torch.zeros(3, 2, 2), "a"), DataError, "pixels are uint8 (3, 32, 32)"),
        (lambda: pretrained.fill_mask(pictures[0], "no mask"), DataError, "no [MASK] in the first"),
        (lambda: pretrained.fill_mask(pictures[0], "a [MASK]", top=0), DataError, "top=0 is out of range"),
        (lambda: pretrained.encode_texts([]), DataError, "no texts were given"),
        (lambda: pretrained.encode_images([]), DataError, "no pictures were given"),
        (lambda: bt.load(tmp_path / "nowhere"), CheckpointError, "does not exist"),
        (lambda: bt.load(smoke_runs / "runs/vqa_base", device="tpu9"), ConfigError, "allowed are auto, cpu, cuda"),
        (lambda: bt.load(smoke_runs / "runs/vqa_base", device="meta"), ConfigError, "device=meta is no device to use"),
        (lambda: bt.load(smoke_runs / "runs/vqa_base", device="mps"), ConfigError, "allowed are auto, cpu, cuda"),
        (lambda: bt.load(smoke_runs / "runs/vqa_base", dtype="int8"), ConfigError, "not one of: fp32, bf16, fp16"),
    ):
        with pytest.raises(kind) as error:
            call()
        assert said in str(error.value) and "\n" not in str(error.value), str(error.value)
