"""Shards of a model compute what the whole model does, whatever it is made of."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bt.data.batch import Batch
from bt.engine.distributed import World
from bt.engine.evaluate import gathered
from bt.engine.parallel import Parallel, Shards, layers, whole
from bt.tasks.base import TaskModel
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM
from tests.models.test_bridges import BRIDGES, CROSS, model_of
from tests.models.test_encoder_families import FAMILIES, TEXTS, text, tower_of, vision
from tests.models.towers import make_images, make_texts, make_tower
from tests.tasks.helpers import CONTEXT, make_batch

ALONE = World(0, 1, torch.device("cpu"))
PAIRS = torch.tensor([[0, 0], [1, 1], [0, 2]])


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of this process alone, so that shards are those of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch_of(size: int, vocabulary: int) -> Batch:
    """Two images, three texts; every objective's targets."""
    texts = make_texts(3, 7)
    texts.ids = texts.ids.clamp(max=vocabulary - 1)
    positions = torch.zeros_like(texts.mask)
    positions[0, 2] = positions[2, 1] = True
    targets = {
        "mlm": {"ids": texts.ids, "mask": texts.mask, "positions": positions, "labels": texts.ids[positions]},
        "itm": {"pairs": torch.tensor([[0, 0], [0, 1], [1, 2]]), "labels": torch.tensor([1, 0, 0])},
        "itc": {"pair": torch.arange(3)},
    }
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 255
    return make_batch(texts, PAIRS, targets, images=images)


def backward(parallel: Parallel, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses and gradients of two micro-batches, clipped."""
    torch.manual_seed(0)  # dropout, managers' noise, Swin's blocks that are left out
    found = {}
    for last in (False, True):
        with parallel.accumulating(last):
            results = parallel.forward(batch)
            sum(result.loss for result in results.values()).backward()
        found |= {f"{name} {last}": result.loss.detach() for name, result in results.items()}
    parallel.finish_backward()
    parallel.clip_gradients(0.5)
    return found | {name: whole(p.grad) for name, p in parallel.model.named_parameters() if p.grad is not None}


def assert_shards_agree(model: TaskModel, size: int = 32, vocabulary: int = 9) -> None:
    model.train()
    batch = batch_of(size, vocabulary)
    found = backward(Shards(copy.deepcopy(model), ALONE), batch)
    expected = backward(Parallel(model, ALONE), batch)
    names = dict(model.named_parameters())
    norm = torch.stack([value.norm() for name, value in expected.items() if name in names]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
    assert_close(found, expected)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 60
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "bridge, cross",
    [*((bridge, "tiny") for bridge in BRIDGES), *(("add", cross) for cross in CROSS if cross != "tiny")],
)
def test_every_bridge_and_cross_modal_encoder(bridge, cross):
    assert_shards_agree(model_of(bridge, cross, "task=pretrain_itc"))


def objectives() -> dict[str, nn.Module]:
    return {"mlm": MLM(CONTEXT), "itm": ITM(CONTEXT)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_image_encoder(name):
    encoder = vision(name)
    assert_shards_agree(TaskModel(tower_of(encoder, text("bert")), objectives()), encoder.image_size, 50)


@pytest.mark.parametrize("kind", TEXTS)
def test_every_text_encoder(kind):
    encoder = vision("deit_base_patch16_224")
    words = text(kind, cls="last" if "clip" in kind else "first")
    assert_shards_agree(TaskModel(tower_of(encoder, words), objectives()), encoder.image_size, 50)


@pytest.mark.parametrize("mode", ["cheap", "full"])
@pytest.mark.parametrize("cross", CROSS)
def test_gradient_checkpointing(cross, mode):
    model = model_of("add", cross)
    model.tower.set_gradient_checkpointing(mode)
    assert_shards_agree(model)


def test_parts_that_are_frozen():
    model = model_of("add", "tiny", "encoder.vision.freeze=all")
    assert not all(parameter.requires_grad for parameter in model.parameters())
    assert_shards_agree(model)


def test_parts_can_be_called_while_all_is_gathered():
    """An evaluator encodes images before the model as a whole has ever run, which trains behind it as if it had not."""
    model = TaskModel(make_tower(), objectives())
    shards = Shards(copy.deepcopy(model), ALONE)
    with torch.no_grad(), gathered(shards.model):
        found = shards.model.eval().tower.encode_images(make_images(2)).cls
        torch.testing.assert_close(found, model.eval().tower.encode_images(make_images(2)).cls, rtol=0, atol=1e-6)
    batch = batch_of(24, 50)
    assert_close(backward(Parallel(model, ALONE), batch), backward(shards, batch))


def test_shards_of_layers_and_nothing_else():
    """Every encoder layer is found, of this model as of base and large, whose encoders nest them alike."""
    model = make_tower(cross_layers=2, vision_layers=3, text_layers=4)
    names = {id(module): name for name, module in model.named_modules()}
    assert Counter(names[id(layer)].rpartition(".")[0] for layer in layers(model)) == {
        "vision.visual.transformer.resblocks": 3,
        "text.model.encoder.layer": 4,
        "cross.text_layers": 2,
        "cross.image_layers": 2,
    }
