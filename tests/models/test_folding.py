"""Other orders of products: the numbers and gradients of projecting everything first."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU as ReferenceQuickGELU
from torch import Tensor, nn

from bt.models.cross_modal import Attention, CrossModalLayer
from bt.models.folding import cheapest, few_keys, few_queries
from bt.models.gather import ALL, Reading, gather
from bt.models.quick_gelu import QuickGELU

WIDTH, HEADS = 24, 3


def compare(folded, plain, inputs: list[Tensor], layer: nn.Module) -> None:
    """Outputs and all gradients of two functions of `inputs`."""
    results = []
    for function in (folded, plain):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        layer.zero_grad()
        output = function(*leaves)
        (output * torch.arange(1.0, output.numel() + 1).sin().view_as(output)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in layer.parameters())])
    assert results[0][0].abs().max() > 0.1
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def make_layer(norm: str = "post") -> CrossModalLayer:
    torch.manual_seed(0)
    layer = CrossModalLayer(WIDTH, HEADS, 2.0, 0.0, 1e-5, norm)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    return layer


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("rows", ["own", "other", "none"])
@pytest.mark.parametrize("order", ["few_queries", "few_keys"])
def test_every_order_of_a_layer(monkeypatch, order, rows, norm):
    """With inputs that pairs share, masks on both sides and both kinds of norms."""
    layer = make_layer(norm)
    own_rows = torch.tensor([0, 0, 1, 0]) if rows == "own" else None
    other_rows = torch.tensor([1, 0, 1, 1]) if rows == "other" else None
    own, other = (torch.randn(2 if given is not None else 4, n, WIDTH) for given, n in ((own_rows, 5), (other_rows, 7)))
    own_mask, other_mask = torch.ones(len(own), 5, dtype=torch.bool), torch.ones(4, 7, dtype=torch.bool)
    own_mask[0, 3:], other_mask[2, 1:] = False, False

    def run(order: str):
        def forward(own: Tensor, other: Tensor) -> Tensor:
            monkeypatch.setattr("bt.models.cross_modal.cheapest", lambda *_: order)
            return layer(own, other, own_rows, other_rows, own_mask, other_mask)

        return forward

    compare(run(order), run("plain"), [own, other], layer)


@pytest.mark.parametrize("reading", ["first", "mask"])
def test_few_positions_of_a_layer(monkeypatch, reading):
    """Self-attention of read positions alone never makes the keys and values of the others."""
    layer = make_layer()
    own, other = torch.randn(3, 9, WIDTH), torch.randn(3, 6, WIDTH)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[[0, 0, 2], [1, 4, 8]] = True
    read = Reading(first=True) if reading == "first" else Reading.of(mask)

    def run(order: str):
        def forward(own: Tensor, other: Tensor) -> Tensor:
            monkeypatch.setattr("bt.models.cross_modal.cheapest", lambda *_: order)
            return layer(own, other, read=read)

        return forward

    compare(run("few_queries"), run("plain"), [own, other], layer)


def reference(x: Tensor, z: Tensor, q: nn.Linear, kv: nn.Linear, out: nn.Linear, drop: Tensor) -> Tensor:
    """Attention written out, with given factors `drop` (P, heads, R, K) on its weights."""
    queries, (keys, values) = q(x), kv(z).chunk(2, -1)
    queries, keys, values = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (queries, keys, values))
    weights = (queries @ keys.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) * drop
    return out((weights @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("order", ["few_queries", "few_keys"])
def test_dropout_of_attention_weights(monkeypatch, order):
    """Weights that are dropped no longer sum to 1, which biases have to know."""
    torch.manual_seed(0)
    q, kv, out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
    x, z = torch.randn(2, 4, WIDTH), torch.randn(2, 5, WIDTH)
    drop = (torch.rand(2, HEADS, 4, 5) < 0.6) / 0.6

    def dropped(weights: Tensor, rate: float, training: bool) -> Tensor:
        assert rate == 0.4 and training
        by_head = drop if order == "few_queries" else drop.transpose(1, 2)
        return weights * by_head.reshape(weights.shape)

    monkeypatch.setattr(F, "dropout", dropped)
    if order == "few_queries":
        found = out(few_queries(q(x), z, kv.weight, kv.bias[WIDTH:], HEADS, None, 0.4))
    else:
        found = few_keys(x, kv(z), None, q, out, HEADS, None, 0.4)
    torch.testing.assert_close(found, reference(x, z, q, kv, out, drop), rtol=1e-5, atol=1e-6)


def test_the_order_with_the_fewest_multiplications():
    """At base size: texts of 18 tokens and images of 325 are folded, as long as a text has fewer than 64 tokens."""
    text, image = (4, 18), (4, 325)
    assert cheapest(768, 12, 4, text, image) == "few_queries"
    assert cheapest(768, 12, 4, image, text) == "few_keys"
    assert cheapest(768, 12, 4, (4, 70), image) == cheapest(768, 12, 4, image, (4, 70)) == "plain"
    # One image of many pairs: its keys and values are projected once for all of them.
    assert cheapest(768, 12, 40, (40, 18), (1, 325)) == "plain"


def test_folding_can_be_switched_off():
    layer = make_layer().eval()
    own, other = torch.randn(2, 2, WIDTH), torch.randn(2, 40, WIDTH)
    calls = []
    layer.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    folded = layer(own, other)
    assert not calls
    layer.cross_attention.folding = False
    torch.testing.assert_close(layer(own, other), folded, rtol=1e-5, atol=1e-6)
    assert calls and Attention.folding


def test_self_attention_that_was_done_before():
    """`attended` of unique inputs gives what each pair's own would."""
    layer = make_layer()
    own, other, rows = torch.randn(2, 5, WIDTH), torch.randn(4, 7, WIDTH), torch.tensor([0, 1, 1, 0])
    attended = layer(own, None)
    found = layer(own, other, rows, attended=attended)
    torch.testing.assert_close(found, layer(gather(own, rows), other, read=ALL), rtol=1e-5, atol=1e-6)


def test_quick_gelu():
    """open_clip's formula: values, gradients, and one kept tensor."""
    x = torch.linspace(-9, 9, 1001)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mine = QuickGELU()(own := x.clone().requires_grad_())
    theirs = ReferenceQuickGELU()(other := x.clone().requires_grad_())
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    mine.sum().backward(), theirs.sum().backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert len(kept) == 1 and kept[0] is own


@pytest.mark.parametrize("order", ["few_queries", "few_keys"])
def test_half_precision(monkeypatch, order):
    """Under autocast every order is as far from float32 as the plain one: by the precision of bfloat16."""
    layer = make_layer().eval()
    own, other = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    exact = layer(own, other, other_mask=mask)
    monkeypatch.setattr("bt.models.cross_modal.cheapest", lambda *_: order)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(own, other, other_mask=mask)
    assert (rounded - exact).abs().max() < 0.05 < 0.1 < exact.abs().max()
