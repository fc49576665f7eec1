"""The tower from the configuration files, its new weights, roles, and state dicts of other inputs."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn
from transformers import BridgeTowerConfig, BridgeTowerModel

from bt.data.batch import Texts
from bt.errors import ConfigError
from bt.models.bridgetower import Need, build_tower
from bt.models.heads import ClassifierHead, ITCHead, ITMHead, MLMHead, Pooler
from tests.models.towers import make_tower

CONF = Path(__file__).parents[2] / "conf"


def node(group: str, choice: str) -> dict:
    """The config node of one choice of a group."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"{group}/{choice}")
    return OmegaConf.to_container(config, resolve=True)[group.split("/")[0]]


def tower_of(encoder: str, bridge: str = "add", cross: str | None = None, **changes):
    cross_config = {**node("cross", cross or encoder), **changes}
    return build_tower(node("encoder", encoder), node("bridge", bridge), cross_config, vocab_size=40)


@pytest.mark.parametrize("encoder, width, tokens, parameters", [("small", 128, 17, 1.786e6), ("tiny", 32, 5, 0.152e6)])
@pytest.mark.parametrize("bridge", ["add", "none"])
def test_presets_run_forward_and_backward(encoder, width, tokens, parameters, bridge):
    torch.manual_seed(0)
    tower = tower_of(encoder, bridge)
    size = tower.vision.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(5, 40, (3, 7))
    images = tower.encode_images(tower.vision.normalize(pixels))
    texts = tower.encode_texts(Texts(ids, torch.ones_like(ids, dtype=torch.bool)))
    fused = tower.fuse(images, texts, torch.tensor([[0, 0], [1, 1], [1, 2]]), Need(cls=True, text=True, image=True))
    assert (fused.cls.shape, fused.text.shape) == ((3, 2 * width), (3, 7, width))
    assert fused.image.shape == (3, tokens, width)
    fused.cls.square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == set()
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(parameters, rel=0.002)


@pytest.mark.parametrize("size, layers, depth, width", [("base", 6, 12, 768), ("large", 6, 24, 1024)])
def test_paper_presets_have_the_papers_sizes(size, layers, depth, width):
    """Without weights: the architectures alone, on the meta device."""
    encoder = node("encoder", size)
    encoder["vision"]["pretrained"] = None
    name = encoder["text"]["name"]
    assert name == f"FacebookAI/roberta-{size}" and encoder["text"]["tokenizer"]["name"] == name
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    roberta = {"model_type": "roberta", "intermediate_size": 4 * width, "max_position_embeddings": 514, **sizes}
    encoder["text"].update(name=None, config={**roberta, "type_vocab_size": 1})
    with torch.device("meta"):
        tower = build_tower(encoder, node("bridge", "add"), node("cross", size), vocab_size=50265)
    assert (tower.vision.width, tower.vision.depth, tower.text.depth) == (width, depth, depth)
    assert (tower.width, tower.cross.layers, tower.text_bridge.states) == (width, layers, layers)
    assert tower.cross.text_layers[0].ffn.norm.eps == 1e-12
    port = {"hidden_size": width, "num_attention_heads": width // 64, "num_hidden_layers": layers}
    text = {**sizes, "intermediate_size": 4 * width, "vocab_size": 50265}
    image = {"patch_size": tower.vision.image_size // tower.vision.grid, "image_size": tower.vision.image_size}
    image |= {"hidden_size": width, "num_hidden_layers": depth}
    with torch.device("meta"):
        theirs = BridgeTowerModel(BridgeTowerConfig(**port, text_config=text, vision_config=image))
    # The same parameters as transformers' port, but for RoBERTa's unused pooler.
    unused = sum(p.numel() for p in theirs.text_model.pooler.parameters())
    found = sum(p.numel() for p in tower.parameters())
    assert found == sum(p.numel() for p in theirs.parameters()) - unused


@pytest.mark.parametrize("path", sorted(CONF.glob("encoder/*/*.yaml")) + sorted(CONF.glob("[bc]r*/*.yaml")), ids=str)
def test_every_option_of_a_class_is_shown(path):
    shown = OmegaConf.load(path)
    for parent in shown.pop("defaults", []):
        shown = OmegaConf.merge(OmegaConf.load(path.with_name(f"{parent}.yaml")), shown)
    given = (
        {"vocab_size", "pad_id"}
        if path.parent.name == "text"
        else {"width", "layers", "uni_width", "depth"}
        if "bridge" in path.parts
        else set()
    )
    options = set(inspect.signature(get_class(shown["_target_"])).parameters) - given
    assert set(shown) - {"_target_", "tokenizer"} == options


def test_bridge_widths_follow_the_cross_modal_layers():
    tower = tower_of("tiny", cross="tiny", layers=3, width=16)
    assert [norm.normalized_shape for norm in tower.text_bridge.norms] == [(16,)] * 3
    assert tower.text_projection.weight.shape == (16, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 4}, "the bridge reads the top 4 layers of each encoder, encoder.text has 3: see cross.layers"),
        ({"layers": -1}, "cross.layers=-1: must be at least 0"),
        ({"heads": 0}, "cross.heads=0: must be at least 1"),
        ({"dropout": 1.0}, "cross.dropout=1.0: must be at least 0 and below 1"),
        ({"init_std": float("nan")}, "cross.init_std=nan: must be above 0"),
        ({"width": "wide"}, "cross: '>=' not supported between instances of 'str' and 'int'"),
        ({"heads": 3}, "cross.heads=3 does not divide cross.width=32"),
        ({"depth": 3}, "cross: got an unexpected keyword argument 'depth'.*options are width, heads, layers"),
        ({"_target_": "bt.models.Nothing"}, "cross._target_=bt.models.Nothing is no class"),
    ],
)
def test_mistakes_name_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        tower_of("tiny", **changes)


class Divider(nn.Module):
    def __init__(self, width: int, layers: int, by: int):
        self.states = layers // by


def test_what_a_constructor_raises_becomes_one_line_with_the_key():
    bridge = {"_target_": f"{__name__}.Divider", "by": 0}
    with pytest.raises(ConfigError, match="^bridge: integer division or modulo by zero$"):
        build_tower(node("encoder", "tiny"), bridge, node("cross", "tiny"), vocab_size=40)


def test_random_text_encoders_take_the_tokenizers_padding():
    towers = [
        build_tower(node("encoder", "tiny"), node("bridge", "add"), node("cross", "tiny"), vocab_size=40, pad_id=pad)
        for pad in (3, None)
    ]
    assert [tower.text.pad_id for tower in towers] == [3, 1]
    assert towers[0].text.model.embeddings.word_embeddings.padding_idx == 3
    # RoBERTa's positions start behind the pad id.
    assert [tower.text.max_positions for tower in towers] == [62, 64]


def test_meter_reads_one_layer_whatever_the_depth():
    tower = tower_of("tiny", "none", layers=5)
    assert tower.text_bridge.states == 1
    assert not [name for name, _ in tower.named_parameters() if "bridge" in name]


def test_roles_follow_the_released_groups():
    """Base rate: encoders and type table; cross rate: what the released names call cross_modal."""
    tower = make_tower()
    base = {name.split(".")[0] for name, _ in tower.named_parameters() if tower.parameter_role(name) == "base"}
    cross = {name.split(".")[0] for name, _ in tower.named_parameters() if tower.parameter_role(name) == "cross"}
    assert base == {"vision", "text", "type_embeddings"}
    assert cross == {f"{m}_{part}" for m in ("text", "image") for part in ("projection", "bridge", "pooler")} | {
        "cross"
    }


def test_state_of_other_channels_and_token_types():
    source, target = make_tower(), make_tower(token_types=3, channels=1)
    state = source.state_dict()
    target.load_state_dict(target.adapt_state(state))
    types = target.type_embeddings.weight
    assert torch.equal(types[:2], source.type_embeddings.weight) and torch.equal(types[2], types[1])
    assert state["type_embeddings.weight"].shape == (2, 16), "the given state is left as it was"
    pixels = torch.randint(0, 256, (2, 1, 24, 24), dtype=torch.uint8)
    found = target.encode_images(target.vision.normalize(pixels))
    expected = source.encode_images(source.vision.normalize(pixels.repeat(1, 3, 1, 1)))
    assert torch.equal(found.cls, expected.cls) and torch.equal(found.states[0], expected.states[0])
    # One number of channels to another: the pre-trained filters, repeated and scaled.
    six = make_tower(channels=6)
    six.load_state_dict(six.adapt_state(state))
    assert torch.equal(six.vision.visual.conv1.weight, source.vision.visual.conv1.weight.repeat(1, 2, 1, 1) / 2)


def test_a_longer_type_table_is_not_cut():
    """It is left for the loader, which names the shapes that differ."""
    state = make_tower(token_types=3).state_dict()
    adapted = make_tower().adapt_state(state)
    assert torch.equal(adapted["type_embeddings.weight"], state["type_embeddings.weight"])


def new_parts(tower) -> list[nn.Module]:
    """What no pre-trained weights are loaded into."""
    return [
        tower.cross,
        tower.text_projection,
        tower.image_projection,
        tower.type_embeddings,
        tower.text_pooler,
        tower.image_pooler,
        tower.text_bridge,
        tower.image_bridge,
    ]


def assert_new(parts: list[nn.Module], std: float) -> None:
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.std().item() == pytest.approx(std, rel=0.15)
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        if isinstance(module, nn.Linear | nn.LayerNorm):
            assert not module.bias.any()


def test_new_parts_start_as_the_released_ones():
    torch.manual_seed(0)
    heads = [Pooler(64), MLMHead(64, 99), ITMHead(64), ITCHead(64, 32), ClassifierHead(128, 256, 7)]
    assert_new(heads + new_parts(tower_of("small", init_std=0.02)), 0.02)


def test_new_parts_of_the_tower_take_init_std():
    torch.manual_seed(0)
    assert_new(new_parts(tower_of("small", init_std=0.1)), 0.1)


def test_heads():
    torch.manual_seed(0)
    features = ITCHead(8, 5)(torch.randn(3, 8))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert ITMHead(8)(torch.randn(3, 16)).shape == (3, 2)
    assert [type(part).__name__ for part in ClassifierHead(8, 16, 3)] == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert len(ClassifierHead(8, 16, 3, layers=1)) == 1
    with pytest.raises(ConfigError, match="allowed are 1, 2"):
        ClassifierHead(8, 16, 3, layers=3)
