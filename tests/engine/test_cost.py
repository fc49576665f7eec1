"""What a model costs: parameters and FLOPs by part, against sums made by hand."""

import json

import pytest
import torch
from torch import nn

from bt.assemble import build_model
from bt.data.text import train_tokenizer
from bt.engine.cost import PARTS, measure_cost, part_of
from bt.models.bridges.learned import GateBridge
from bt.models.bridges.meter_fusion import MeterFusionBridge
from bt.models.bridgetower import BridgeTower
from bt.models.cross_modal import Attention
from bt.tasks.base import Objective, TaskModel
from tests.models.towers import TEXT, VISION, make_tower
from tests.test_config import composed
from tests.test_train import run

WIDTH, TOKENS, PATCHES = 16, 9, 9
SEEN = PATCHES + 1  # with the [CLS]


@pytest.fixture(autouse=True)
def products_as_written(monkeypatch):
    """The sums below take products in the released order; tests of bt.models.folding count the cheaper ones."""
    monkeypatch.setattr(Attention, "folding", False)


class Classifier(Objective):
    """A loss that reads all of the tower, with a head of one linear map."""

    def __init__(self, tower_parts=None):
        super().__init__(1.0, dict)
        self.head = nn.Linear(2 * WIDTH, 5)
        self.tower_parts = tower_parts


def dense(rows: int, *widths: int) -> int:
    return sum(2 * rows * a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def attention(queries: int, keys: int, width: int) -> int:
    return 2 * 2 * queries * keys * width


def encoder_layer(tokens: int, width: int, hidden: int) -> int:
    return (
        dense(tokens, width, 3 * width)
        + attention(tokens, tokens, width)
        + dense(tokens, width, width)
        + dense(tokens, width, hidden, width)
    )


def cross_layer(read: int, tokens: int, other: int) -> int:
    """One layer of one modality of which `read` positions are computed."""
    own = dense(read, WIDTH, WIDTH) + dense(tokens, WIDTH, 2 * WIDTH) + attention(read, tokens, WIDTH)
    across = dense(read, WIDTH, WIDTH) + dense(other, WIDTH, 2 * WIDTH) + attention(read, other, WIDTH)
    return own + across + 2 * dense(read, WIDTH, WIDTH) + dense(read, WIDTH, 4 * WIDTH, WIDTH)


def towers_cost(bridge: type | None = None, tower_parts: tuple[str, ...] | None = None):
    tower = make_tower()
    if bridge is GateBridge:
        tower = rebuilt(tower, *(GateBridge(WIDTH, 2) for _ in range(2)))
    if bridge is MeterFusionBridge:
        widths = tower.text.width, tower.vision.width
        tower = rebuilt(tower, *(MeterFusionBridge(WIDTH, 2, uni_width=width, depth=3) for width in widths))
    model = TaskModel(tower, {"head": Classifier(tower_parts)}).train()
    state = torch.get_rng_state()
    cost = measure_cost(model, TOKENS)
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert sum(cost.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    return model, cost


def rebuilt(tower: BridgeTower, *bridges) -> BridgeTower:
    return BridgeTower(tower.vision, tower.text, *bridges, tower.cross)


def test_flops_are_those_of_the_formulas():
    model, cost = towers_cost()
    vision, text = VISION["width"], TEXT["hidden_size"]
    patches = dense(PATCHES, 3 * 8 * 8, vision)
    assert cost.flops["vision"] == patches + 3 * encoder_layer(SEEN, vision, 2 * vision)
    assert cost.flops["text"] == 3 * encoder_layer(TOKENS, text, TEXT["intermediate_size"])
    layers = cross_layer(TOKENS, TOKENS, SEEN) + cross_layer(SEEN, SEEN, TOKENS)  # the first
    layers += cross_layer(1, TOKENS, SEEN) + cross_layer(1, SEEN, TOKENS)  # the last, of which [CLS] alone is read
    projections = 2 * (dense(SEEN, vision, WIDTH) + dense(TOKENS, text, WIDTH))  # of the two states that bridges read
    assert cost.flops["cross"] == layers + projections + 2 * dense(1, WIDTH, WIDTH)
    assert cost.flops["bridges"] == 0 and cost.flops["heads"] == dense(1, 2 * WIDTH, 5)
    norms = 2 * 2 * 2 * WIDTH
    assert cost.parameters["bridges"] == norms and cost.parameters["heads"] == 5 * (2 * WIDTH + 1)
    assert cost.parameters["vision"] == sum(p.numel() for p in model.tower.vision.parameters())


def test_a_bridges_own_products_are_counted_where_they_are_made():
    """The gate's in its forward, METER's fusion before the projection; the other parts cost what they did."""
    _, add = towers_cost()
    _, gate = towers_cost(GateBridge)
    assert gate.flops["bridges"] == dense(SEEN + TOKENS, 2 * WIDTH, WIDTH)
    assert {part: gate.flops[part] for part in PARTS if part != "bridges"} == {
        part: add.flops[part] for part in PARTS if part != "bridges"
    }
    _, fusion = towers_cost(MeterFusionBridge)
    vision, text = VISION["width"], TEXT["hidden_size"]
    assert fusion.flops["bridges"] == 2 * (dense(SEEN, vision, vision) + dense(TOKENS, text, text))


def test_what_no_objective_reads_costs_nothing():
    _, alone = towers_cost(tower_parts=("text",))
    _, both = towers_cost()
    assert alone.flops == {**dict.fromkeys(PARTS, 0), "text": both.flops["text"], "heads": both.flops["heads"]}


@pytest.mark.parametrize(
    ("bridge", "millions"), [("gate", 11.8), ("mlp", 35.4), ("cross_attention", 23.6), ("cross_attention_ffn", 70.8)]
)
def test_the_papers_table_of_bridges(bridge, millions):
    """Parameters at base size as the paper's ablation lists them, which counts the norms elsewhere."""
    cfg = composed(f"bridge={bridge}", "bridge.uni_layers=last", "task=pretrain", "encoder=tiny", "data.max_text_len=9")
    with torch.device("meta"):
        model = build_model(cfg, train_tokenizer(["a red circle"]), {})
    found = [p.numel() for name, p in model.named_parameters() if part_of(name) == "bridges" and ".norms." not in name]
    assert round(sum(found) / 1e6, 1) == millions


def test_a_run_says_it_and_leaves_it_in_its_report(tmp_path):
    settings = ["experiment=vqa_base", "bridge=gate", "trainer=smoke", "trainer.max_steps=1", "run_dir=run"]
    done = run("bt.train", *settings, "tracking.uri=sqlite:///store.db", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    cost = report["cost"]
    assert sum(cost["parameters"].values()) == report["parameters"]["all"] and cost["tokens"] == 50
    assert cost["flops"]["bridges"] == 2 * 2 * 32 * 32 * (50 + tokens_of_an_image(tmp_path))
    assert "GFLOP of an image with a text of 50 tokens: vision " in done.stdout
    from mlflow import MlflowClient

    (found,) = MlflowClient(f"sqlite:///{tmp_path}/store.db").search_runs(["1"])
    for part in PARTS:
        assert found.data.tags[f"cost.parameters.{part}"] == str(cost["parameters"][part])
        assert found.data.tags[f"cost.flops.{part}"] == str(cost["flops"][part])
    assert float(found.data.tags["seconds"]) == report["seconds"] and found.data.tags["world_size"] == "1"


def tokens_of_an_image(folder) -> int:
    from bt.config import read_config
    from bt.models.bridgetower import build

    cfg = read_config(folder / "run")
    vision = {key: value for key, value in cfg.encoder.vision.items() if key != "freeze"}
    encoder = build("encoder.vision", vision)
    side = cfg.encoder.vision["image_size"]
    return encoder(torch.zeros(1, 3, side, side), 1)[0].shape[1]
