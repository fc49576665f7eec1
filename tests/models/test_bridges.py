"""Every bridge and every cross-modal encoder of conf/: formulas, options, and that all of it trains."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bridgetower.configuration_bridgetower import BridgeTowerConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerLinkTower

from bt.assemble import build_model
from bt.config.schema import check_run
from bt.data.text import train_tokenizer
from bt.errors import ConfigError
from bt.models.bridges import attention, learned, weighted
from bt.models.bridges.manager import ManagerBridge
from bt.models.bridgetower import Need
from tests.models.towers import gradients, make_images, make_texts, make_tower
from tests.test_config import composed

CONF = Path(__file__).parents[2] / "conf"
BRIDGES = sorted(path.stem for path in CONF.glob("bridge/*.yaml"))
CROSS = ["tiny", "merged", "asymmetric"]
WIDTH, LAYERS = 12, 3


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(bridge: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return bridge


# The paper's definitions, x the cross-modal state and y the uni-modal one, of the bridge `b` into layer `n`.
FORMULAS = {
    weighted.MultiplyBridge: lambda b, n, x, y: x * y,
    weighted.ScaledAddBridge: lambda b, n, x, y: b.scale[n - 1] * y + x,
    weighted.InterpolateBridge: lambda b, n, x, y: (1 - b.share[n - 1]) * y + b.share[n - 1] * x,
    weighted.VectorBridge: lambda b, n, x, y: b.share[n - 1] * x + (1 - b.share[n - 1]) * y,
    learned.LinearBridge: lambda b, n, x, y: linear(b.maps[n - 1], x, y),
    learned.GateBridge: lambda b, n, x, y: gated(linear(b.maps[n - 1], x, y).sigmoid(), x, y),
    learned.MLPBridge: lambda b, n, x, y: mlp(b.maps[n - 1], x, y),
    learned.ResidualMLPBridge: lambda b, n, x, y: x + y + mlp(b.maps[n - 1], x, y),
}


def linear(layer, x, y):
    return torch.cat([x, y], -1) @ layer.weight.T + layer.bias


def gated(a, x, y):
    return a * x + (1 - a) * y


def mlp(layers, x, y):
    hidden = F.gelu(linear(layers[0], x, y))
    return hidden @ layers[2].weight.T + layers[2].bias


@pytest.mark.parametrize("kind", FORMULAS)
@torch.no_grad()
def test_definitions_of_the_paper(kind):
    bridge = randomised(kind(WIDTH, LAYERS))
    uni, own, rows = [states(2, 5, WIDTH, seed=i) for i in range(LAYERS)], states(3, 5, WIDTH, seed=9), [1, 0, 1]
    first = bridge(0, uni, torch.tensor(rows), None, None)
    torch.testing.assert_close(first, bridge.norms[0](uni[0]))
    for layer in (1, 2):
        expected = bridge.norms[layer](FORMULAS[kind](bridge, layer, own, uni[layer][rows]))
        torch.testing.assert_close(bridge(layer, uni, torch.tensor(rows), own, None), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_attention_bridges_leave_padding_out():
    uni, own, mask = [states(2, 5, WIDTH)] * LAYERS, states(2, 5, WIDTH, seed=1), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for kind in (attention.CrossAttentionBridge, attention.CrossAttentionFFNBridge):
        bridge = randomised(kind(WIDTH, LAYERS, heads=3))
        part = bridge.attention[0]
        theirs = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        theirs.in_proj_weight.copy_(torch.cat([part.q.weight, part.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([part.q.bias, part.kv.bias]))
        theirs.out_proj.load_state_dict(part.out.state_dict())
        expected = theirs(own, uni[1], uni[1], key_padding_mask=~mask, need_weights=False)[0]
        if kind is attention.CrossAttentionFFNBridge:
            up, _, down = bridge.ffn[0]
            expected = down(F.gelu(up(expected)))
        found = bridge(1, uni, None, own, None, own_mask=mask, other_mask=None)
        torch.testing.assert_close(found, bridge.norms[1](expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind, ours", [("scaled_add", weighted.ScaledAddBridge), ("interpolate", weighted.InterpolateBridge)]
)
@torch.no_grad()
def test_link_towers_of_transformers(kind, ours):
    theirs = BridgeTowerLinkTower(BridgeTowerConfig(link_tower_type=kind, hidden_size=WIDTH))
    name, value = next((n, p) for n, p in theirs.named_parameters() if "LayerNorm" not in n)
    bridge = ours(WIDTH, 2)
    own_value = bridge.scale if kind == "scaled_add" else bridge.share
    assert own_value.item() == value.item(), f"the starting value of {name}"
    value.fill_(0.3)
    own_value.fill_(0.3)
    uni, own = states(2, 5, WIDTH), states(2, 5, WIDTH, seed=1)
    expected = theirs(uni, own, None)
    torch.testing.assert_close(bridge(1, [uni, uni], None, own, None), expected, rtol=0, atol=1e-6)


def test_the_residual_mlp_starts_as_the_sum():
    bridge, uni, own = learned.ResidualMLPBridge(WIDTH, 2), states(2, 5, WIDTH), states(2, 5, WIDTH, seed=1)
    torch.testing.assert_close(bridge(1, [uni, uni], None, own, None), bridge.norms[1](uni + own))


@torch.no_grad()
def test_adaptive_managers_do_not_depend_on_how_far_texts_are_padded():
    """Unlike the released ones (attend_padding), whose image side attends to padding."""
    uni, own, other = [states(2, 4, WIDTH)] * 2, states(2, 4, WIDTH, seed=1), states(2, 6, WIDTH, seed=2)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    changed = other.masked_fill(~mask[..., None], 5.0)
    differences = {}
    for attend in (False, True):
        bridge = randomised(ManagerBridge(WIDTH, 2, managed=2, noise=False, attend_padding=attend))
        outputs = [bridge(1, uni, None, own, o, own_mask=None, other_mask=mask) for o in (other, changed)]
        differences[attend] = (outputs[0] - outputs[1]).abs().amax((1, 2)).tolist()
    assert differences[False] == [0.0, 0.0]
    assert differences[True][0] == 0.0 and differences[True][1] > 1e-3


@torch.no_grad()
def test_noise_is_for_training_alone():
    bridge, uni = ManagerBridge(WIDTH, 1, kind="static", managed=2), [states(2, 4, WIDTH), states(2, 4, WIDTH, seed=1)]
    bridge.eval()
    assert torch.equal(bridge(0, uni, None, None, None), bridge(0, uni, None, None, None))
    bridge.train()
    assert not torch.equal(bridge(0, uni, None, None, None), bridge(0, uni, None, None, None))


def model_of(bridge: str, cross: str, *overrides: str) -> nn.Module:
    size = ["cross.width=32", "cross.heads=2", "cross.layers=2"] if cross != "tiny" else []
    cfg = composed(
        "encoder=tiny",
        f"cross={cross}",
        f"bridge={bridge}",
        "task=pretrain",
        "data.max_text_len=20",
        *size,
        *overrides,
    )
    tokenizer = train_tokenizer(["a red circle", "a blue square"])
    return build_model(cfg, tokenizer, {})


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("bridge", BRIDGES)
def test_every_bridge_trains_with_every_cross_modal_encoder(bridge, cross):
    """Three steps on one batch lower the loss, and every parameter that should have one gets a gradient."""
    model = model_of(bridge, cross).train()
    tower, optimizer = model.tower, torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    texts = make_texts(4, 7)
    texts.ids = texts.ids.clamp(max=8)
    pairs, labels = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 3]]), torch.tensor([0, 1, 1, 0])
    torch.manual_seed(0)
    losses = []
    for _ in range(3):
        encoded = tower.encode_images(images), tower.encode_texts(texts)
        fused = tower.fuse(*encoded, pairs, Need(cls=True, text=texts.mask[pairs[:, 1]]))
        loss = F.cross_entropy(model.objectives["itm"].head(fused.cls), labels) + fused.text.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    without = {name for name, p in model.named_parameters() if p.grad is None}
    # MLM has no part in this loss; METER's encoders end before their last block where one is cut.
    assert {name for name in without if not name.startswith("objectives.mlm.")} == set()


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("norm", ["post", "pre"])
@torch.no_grad()
def test_what_is_not_read_changes_nothing(cross, norm):
    """[CLS] alone, masked positions alone, and everything, of pairs that share images and texts."""
    tower = model_of("add", cross, f"cross.norm={norm}").tower.eval()
    images, texts = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), make_texts(3, 7)
    texts.ids = texts.ids.clamp(max=8)
    pairs = torch.tensor([[0, 0], [1, 0], [1, 2], [0, 1]])
    encoded = tower.encode_images(images), tower.encode_texts(texts)
    whole = tower.fuse(*encoded, pairs, Need(True, True, True))
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[0, 2] = mask[2, [1, 3]] = True
    part = tower.fuse(*encoded, pairs, Need(cls=True, text=mask))
    torch.testing.assert_close(part.cls, whole.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(part.text, whole.text[mask], rtol=0, atol=1e-5)
    one_by_one = []
    for image, text in pairs.tolist():
        alone = tower.encode_images(images[image : image + 1]), tower.encode_texts(row(texts, text))
        one_by_one.append(tower.fuse(*alone, torch.zeros(1, 2, dtype=torch.long), Need(cls=True)).cls)
    torch.testing.assert_close(torch.cat(one_by_one), whole.cls, rtol=0, atol=1e-5)


def row(texts, number):
    """One text without the padding that the others cause."""
    length = int(texts.mask[number].sum())
    return type(texts)(texts.ids[number : number + 1, :length], texts.mask[number : number + 1, :length])


@pytest.mark.parametrize(
    "chosen, layers",
    [("top", [1, 2]), ("every_second", [0, 2]), ("last", [2, 2]), ([-3, -2], [0, 1])],
)
@torch.no_grad()
def test_which_uni_modal_layers_are_bridged(chosen, layers):
    tower = make_tower(uni_layers=chosen).eval()
    texts = make_texts(2)
    all_states = tower.text(texts.ids, texts.mask, 3)
    encoded = tower.encode_texts(texts)
    for state, layer in zip(encoded.states, layers, strict=True):
        expected = tower.text_projection(all_states[layer]) + tower.type_embeddings.weight[0]
        torch.testing.assert_close(state, expected)
    assert torch.equal(encoded.cls, all_states[-1][:, 0]), "ITC reads the last layer whatever is bridged"


@pytest.mark.parametrize(
    "option, message",
    [
        ("bridge.uni_layers=[-3]", "bridge.uni_layers=\\[-3\\]: the bridge reads 2 layers of encoder.text, here are 1"),
        ("bridge.uni_layers=[-9,-1]", "the bridge reads the top 9 layers of each encoder, encoder.text has 3"),
        ("bridge.uni_layers=some", "bridge.uni_layers=some is not one of: top, every_second, last, or a list"),
        ("bridge.sides=left", "bridge.sides=left is not one of: both, text, image"),
        ("bridge.stop_gradient=maybe", "bridge.stop_gradient=maybe is not one of: true, false"),
    ],
)
def test_choices_that_do_not_fit(option, message):
    with pytest.raises(ConfigError, match=message):
        check_run(composed("data.dir=data/shards", option))
        model_of("add", "tiny", option)


def test_managers_need_cross_modal_layers():
    with pytest.raises(ConfigError, match="cross.layers=0: managers need at least one cross-modal layer"):
        model_of("static_managers", "tiny", "cross.layers=0")


def test_two_towers_without_cross_modal_layers():
    with pytest.raises(ConfigError, match="cross.layers=0: mlm, itm of task.objectives needs cross-modal layers"):
        model_of("add", "tiny", "cross.layers=0")
    cfg = composed(
        "encoder=tiny",
        "cross=tiny",
        "cross.layers=0",
        "task=pretrain_itc",
        "data.max_text_len=20",
        "~task.objectives.mlm",
        "~task.objectives.itm",
        "task.metric=itc/val/loss",
        "task.mode=min",
    )
    tower = build_model(cfg, train_tokenizer(["a red circle"]), {}).tower
    assert tower.encode_images(torch.zeros(2, 3, 32, 32)).cls.shape == (2, 32)
    assert tower.encode_images(torch.zeros(2, 3, 32, 32)).states == []


def test_one_side_has_bridges():
    tower = model_of("add", "tiny", "bridge.sides=text").tower
    assert len(list(tower.text_bridge.parameters())) == 4 and list(tower.image_bridge.parameters()) == []


def test_gradients_through_the_bridges_can_be_stopped():
    """The lower end of the bridges, layer -2, still gets its gradient by the first layer; the last state gets none."""
    reached = {}
    for stop in (False, True):
        tower = make_tower(stop_gradient=stop)
        images, texts = tower.encode_images(make_images(2)), tower.encode_texts(make_texts(2))
        tower.fuse(images, texts, torch.tensor([[0, 0], [1, 1]]), Need(cls=True)).cls.sum().backward()
        reached[stop] = gradients(tower)
    last, below = "text.model.encoder.layer.2.output.dense.weight", "text.model.encoder.layer.1.output.dense.weight"
    assert last in reached[False] and last not in reached[True]
    assert below in reached[True]
    assert not torch.allclose(reached[False][below], reached[True][below])


def test_parameters_of_the_bridges_at_base_size():
    """As the paper's ablation lists them, in millions, of ten bridges: five for each modality."""
    counts = {
        "gate": learned.GateBridge,
        "linear": learned.LinearBridge,
        "mlp": learned.MLPBridge,
        "residual_mlp": learned.ResidualMLPBridge,
        "cross_attention": attention.CrossAttentionBridge,
        "cross_attention_ffn": attention.CrossAttentionFFNBridge,
    }
    with torch.device("meta"):
        found = {
            name: 2 * sum(p.numel() for part, p in kind(768, 6).named_parameters() if not part.startswith("norms"))
            for name, kind in counts.items()
        }
    assert {name: round(count / 1e6, 1) for name, count in found.items()} == {
        "gate": 11.8,
        "linear": 11.8,
        "mlp": 35.4,
        "residual_mlp": 35.4,
        "cross_attention": 23.6,
        "cross_attention_ffn": 70.8,
    }
