"""The tower and its heads against the released BridgeTower and METER (tests/golden/README.md)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bt.models.bridgetower import Need
from bt.models.heads import ClassifierHead, ITCHead, ITMHead, MLMHead
from tests.golden_helpers import (
    ANSWERS,
    CONTRASTIVE,
    CROSS_LAYERS,
    FOLDERS,
    VOCABULARY,
    WIDTH,
    assert_gradients,
    difference,
    golden_batch,
    golden_texts,
    golden_tower,
    load_golden,
    table,
    tensors,
)

OUTPUT, LOSS = 1e-5, 2e-6


class Model(nn.Module):
    """Tower and one objective's parts under the names that a TaskModel gives them."""

    def __init__(self, bridge: str, **objectives: dict[str, nn.Module]):
        super().__init__()
        self.tower = golden_tower(bridge)
        self.objectives = nn.ModuleDict({name: nn.ModuleDict(parts) for name, parts in objectives.items()})
        load_golden(self, bridge)

    def fuse(self, need: Need, images="image", ids="text_ids"):
        batch = golden_batch()
        images = batch[images] if isinstance(images, str) else images
        pairs = torch.arange(len(images))[:, None].expand(-1, 2)
        encoded = self.tower.encode_images(images), self.tower.encode_texts(golden_texts(batch, ids))
        return self.tower.fuse(*encoded, pairs, need)


def record(module: nn.Module, into: dict, name: str):
    """Stores each call's output under `name.<call>`."""
    calls = iter(range(100))
    module.register_forward_hook(lambda _, args, output: into.update({f"{name}.{next(calls)}": output}))


@pytest.mark.parametrize("bridge", FOLDERS)
def test_every_state_of_a_forward_pass(bridge):
    expected = tensors(f"{FOLDERS[bridge]}/infer/outputs")
    tower = Model(bridge).tower
    found = {}
    for modality in ("text", "image"):
        record(getattr(tower, f"{modality}_bridge"), found, f"cross_in_{modality}")
        for number, layer in enumerate(getattr(tower.cross, f"{modality}_layers")):
            key = f"cross_out_{modality}.{number}"
            layer.register_forward_hook(lambda _, args, output, key=key: found.update({key: output}))
    for name, encoder in (("uni_text", tower.text), ("uni_image", tower.vision)):
        encoder.register_forward_hook(
            lambda _, args, states, name=name: found.update({f"{name}.{i}": state for i, state in enumerate(states)})
        )
    batch = golden_batch()
    images, texts = tower.encode_images(batch["image"]), tower.encode_texts(golden_texts(batch))
    fused = tower.fuse(images, texts, torch.arange(4)[:, None].expand(-1, 2), Need(cls=True, text=True, image=True))
    last = found[f"uni_text.{tower.text_bridge.states - 1}"], found[f"uni_image.{tower.image_bridge.states - 1}"]
    assert difference(texts.cls, last[0][:, 0]) == difference(images.cls, last[1][:, 0]) == 0
    for modality in ("text", "image"):
        states = [found.pop(f"uni_{modality}.{i}") for i in range(getattr(tower, f"{modality}_bridge").states)]
        if bridge in ("static", "adaptive"):
            states = [torch.stack(states, dim=1)]
        elif bridge == "fusion":
            states = getattr(tower, f"{modality}_bridge").merge(states)
        found |= {f"uni_{modality}.{i}": state for i, state in enumerate(states)}
    found |= {"cls_feats": fused.cls, "text_feats": fused.text, "image_feats": fused.image}
    # The other fixtures leave out the layers' outputs, which the next layer's inputs or the results show.
    absent = {f"cross_out_{m}.{i}" for m in ("text", "image") for i in range(CROSS_LAYERS) if bridge != "add"}
    assert found.keys() - absent == expected.keys()
    for name, tensor in expected.items():
        assert difference(found[name], tensor) <= OUTPUT, name


@pytest.mark.parametrize("bridge", ["static", "adaptive"])
def test_training_noise_of_managers(bridge, monkeypatch):
    """The recorded draws in the order of the calls: text manager 0, image manager 0, text manager 1, ..."""
    case = f"{FOLDERS[bridge]}/training_noise"
    expected = tensors(f"{case}/outputs")
    tower = Model(bridge).tower.train()
    for side in (tower.text_bridge, tower.image_bridge):
        for manager in side.managers:
            manager.noise = True
    draws = iter([expected.pop(f"noise.{i}") for i in range(2 * CROSS_LAYERS)])
    # Ours divides standard normal draws by the number of managed layers.
    monkeypatch.setattr(torch, "randn_like", lambda like: 2 * next(draws))
    batch = golden_batch()
    encoded = tower.encode_images(batch["image"]), tower.encode_texts(golden_texts(batch))
    fused = tower.fuse(*encoded, torch.arange(4)[:, None].expand(-1, 2), Need(cls=True, text=True, image=True))
    assert next(draws, None) is None
    for name, tensor in {"cls_feats": fused.cls, "text_feats": fused.text, "image_feats": fused.image}.items():
        assert difference(tensor, expected[name]) <= OUTPUT, name


@pytest.mark.parametrize("bridge", FOLDERS)
def test_mlm(bridge):
    case = f"{FOLDERS[bridge]}/mlm"
    model = Model(bridge, mlm={"head": MLMHead(WIDTH, VOCABULARY)})
    labels = golden_batch()["text_labels_mlm"]
    logits = model.objectives["mlm"]["head"](model.fuse(Need(text=labels != -100), ids="text_ids_mlm").text)
    assert difference(logits, tensors(f"{case}/outputs")["logits"][labels != -100]) <= OUTPUT
    loss = F.cross_entropy(logits, labels[labels != -100])
    assert abs(loss.item() - table(f"{case}/scalars")["loss"]) <= LOSS
    loss.backward()
    assert_gradients(model, case)


def test_itm():
    model = Model("add", itm={"head": ITMHead(WIDTH)})
    expected = tensors("bridgetower/itm/outputs")
    logits = model.objectives["itm"]["head"](model.fuse(Need(cls=True), images=expected["mixed_image"]).cls)
    assert difference(logits, expected["logits"]) <= OUTPUT
    loss = F.cross_entropy(logits, expected["labels"])
    assert abs(loss.item() - table("bridgetower/itm/scalars")["loss"]) <= LOSS
    loss.backward()
    assert_gradients(model, "bridgetower/itm")


def test_itc():
    heads = {"text_head": ITCHead(WIDTH, CONTRASTIVE), "image_head": ITCHead(WIDTH, CONTRASTIVE)}
    model = Model("add", itc=heads)
    itc = model.objectives["itc"]
    scalars, expected = table("bridgetower/itc/scalars"), tensors("bridgetower/itc/outputs")
    itc.register_parameter("temperature", nn.Parameter(torch.tensor(scalars["temperature"])))
    batch = golden_batch()
    images = itc["image_head"](model.tower.encode_images(batch["image"]).cls)
    texts = itc["text_head"](model.tower.encode_texts(golden_texts(batch)).cls)
    assert difference(images, expected["image_embeds"]) <= OUTPUT
    assert difference(texts, expected["text_embeds"]) <= OUTPUT
    logits = images @ texts.T / itc.temperature
    # Cosines divided by a temperature of 0.07: the features' tolerance grows by its inverse.
    assert difference(logits, expected["logits_i2t"]) <= OUTPUT / scalars["temperature"]
    assert difference(logits.T, expected["logits_t2i"]) <= OUTPUT / scalars["temperature"]
    loss = (F.cross_entropy(logits, expected["labels"]) + F.cross_entropy(logits.T, expected["labels"])) / 2
    assert abs(loss.item() - scalars["loss"]) <= LOSS
    loss.backward()
    error = assert_gradients(model, "bridgetower/itc", least=60)
    assert error.compared < 140, "the contrastive loss reaches the encoders and its heads alone"


@pytest.mark.parametrize("bridge", ["add", "none", "fusion"])
def test_vqa(bridge):
    case = f"{FOLDERS[bridge]}/vqa"
    hidden = (4 if bridge == "add" else 2) * WIDTH
    model = Model(bridge, vqa={"head": ClassifierHead(2 * WIDTH, hidden, ANSWERS)})
    expected = tensors(f"{case}/outputs")
    logits = model.objectives["vqa"]["head"](model.fuse(Need(cls=True)).cls)
    assert difference(logits, expected["logits"]) <= OUTPUT
    loss = F.binary_cross_entropy_with_logits(logits, expected["targets"]) * ANSWERS
    assert abs(loss.item() - table(f"{case}/scalars")["loss"]) <= LOSS
    loss.backward()
    assert_gradients(model, case)
