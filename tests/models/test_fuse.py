"""Pairs of unique inputs: the same numbers as pair by pair, nothing computed that is not read."""

import pytest
import torch
from torch import Tensor

from bt.data.batch import Texts
from bt.models.bridgetower import BridgeTower, Need
from bt.models.gather import gather, rows_or_none
from tests.models.towers import gradients, make_images, make_texts, make_tower

# Two images with five and two texts, not in order.
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 4], [0, 2], [0, 3], [1, 6], [0, 5]])


def fuse(tower: BridgeTower, pairs: Tensor, need: Need, images: int = 2, texts: int = 7):
    encoded = tower.encode_images(make_images(images)), tower.encode_texts(make_texts(texts))
    return tower.fuse(*encoded, pairs, need)


def total(*outputs: Tensor) -> Tensor:
    """A scalar whose gradient differs in every entry."""
    return sum((o * torch.arange(1.0, o.numel() + 1).cos().view_as(o)).sum() for o in outputs)


@pytest.mark.parametrize("bridge, layers", [("add", 2), ("add", 1), ("none", 2), ("none", 1)])
def test_grouped_pairs_equal_single_pairs(bridge, layers):
    """One image with five texts: outputs and gradients as if every pair were encoded and fused on its own."""
    tower = make_tower(bridge, layers)
    images, texts = make_images(2), make_texts(7)
    grouped = fuse(tower, PAIRS, Need(cls=True, text=True, image=True))
    total(grouped.cls, grouped.text, grouped.image).backward()
    expected_gradients = gradients(tower)
    tower.zero_grad()
    singles = []
    for image, text in PAIRS.tolist():
        row = Texts(texts.ids[text : text + 1], texts.mask[text : text + 1])
        encoded = tower.encode_images(images[image : image + 1]), tower.encode_texts(row)
        singles.append(tower.fuse(*encoded, torch.zeros(1, 2, dtype=torch.long), Need(True, True, True)))
    outputs = [torch.cat([getattr(single, name) for single in singles]) for name in ("cls", "text", "image")]
    total(*outputs).backward()
    for found, expected in zip((grouped.cls, grouped.text, grouped.image), outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    found_gradients = gradients(tower)
    assert found_gradients.keys() == expected_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in found_gradients.values())
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("bridge, layers", [("add", 2), ("add", 1), ("none", 2)])
@pytest.mark.parametrize("cls", [False, True])
def test_positions_of_a_mask_equal_those_of_the_full_output(bridge, layers, cls):
    """Masks select different numbers of positions per pair, none at all in some, position 0 in some."""
    tower = make_tower(bridge, layers)
    generator = torch.Generator().manual_seed(3)
    text_mask = (torch.rand(7, 9, generator=generator) < 0.3) & make_texts(7).mask[PAIRS[:, 1]]
    image_mask = torch.rand(7, 10, generator=generator) < 0.2
    text_mask[1] = False
    text_mask[2, 0] = True
    image_mask[3, 0] = True
    full = fuse(tower, PAIRS, Need(cls=True, text=True, image=True))
    part = fuse(tower, PAIRS, Need(cls=cls, text=text_mask, image=image_mask))
    torch.testing.assert_close(part.text, full.text[text_mask], rtol=0, atol=2e-6)
    torch.testing.assert_close(part.image, full.image[image_mask], rtol=0, atol=2e-6)
    if cls:
        torch.testing.assert_close(part.cls, full.cls, rtol=0, atol=2e-6)
    else:
        assert part.cls is None
    extra = [full.cls] if cls else []
    total(full.text[text_mask], full.image[image_mask], *extra).backward()
    expected = gradients(tower)
    tower.zero_grad()
    total(part.text, part.image, *([part.cls] if cls else [])).backward()
    found = gradients(tower)
    unused = set() if cls else {f"{m}_pooler.dense.{p}" for m in ("text", "image") for p in ("weight", "bias")}
    assert found.keys() == expected.keys() and not unused & found.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_cls_alone_equals_cls_of_the_full_output():
    tower = make_tower()
    full = fuse(tower, PAIRS, Need(cls=True, text=True, image=True))
    alone = fuse(tower, PAIRS, Need(cls=True))
    torch.testing.assert_close(alone.cls, full.cls, rtol=0, atol=2e-6)
    assert alone.text is None and alone.image is None


def test_an_empty_mask_gives_no_rows_and_zero_gradients():
    tower = make_tower()
    fused = fuse(tower, PAIRS, Need(text=torch.zeros(7, 9, dtype=torch.bool)))
    assert fused.text.shape == (0, 16)
    fused.text.sum().backward()
    assert all(not gradient.any() for gradient in gradients(tower).values())


def test_text_alone_leaves_poolers_and_last_image_layer_without_gradient():
    tower = make_tower()
    total(fuse(tower, PAIRS, Need(text=True)).text).backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    last = {f"cross.image_layers.1.{name}" for name, _ in tower.cross.image_layers[1].named_parameters()}
    poolers = {f"{m}_pooler.dense.{p}" for m in ("text", "image") for p in ("weight", "bias")}
    assert without == last | poolers


def test_last_layer_runs_only_for_what_is_read():
    """The rows that enter the last feed-forward layers: one per pair for [CLS], the masked ones for MLM."""
    tower = make_tower()
    rows = {}
    for modality in ("text", "image"):
        ffn = getattr(tower.cross, f"{modality}_layers")[-1].ffn
        ffn.register_forward_pre_hook(
            lambda _, args, modality=modality: rows.update({modality: args[0].shape[:-1].numel()})
        )
    fuse(tower, PAIRS, Need(cls=True))
    assert rows == {"text": 7, "image": 7}
    rows.clear()
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[[0, 0, 4], [1, 3, 2]] = True
    fuse(tower, PAIRS, Need(text=mask))
    assert rows == {"text": 3}


def test_first_layer_computes_once_per_unique_input():
    tower = make_tower()
    batch = {}
    for modality in ("text", "image"):
        layer = getattr(tower.cross, f"{modality}_layers")[0]
        layer.cross_attention.folding = False  # which would leave out projections
        for part in ("self_attention.qkv", "cross_attention.q", "cross_attention.kv", "ffn"):
            key = f"{modality}.{part}"
            layer.get_submodule(part).register_forward_pre_hook(
                lambda _, args, key=key: batch.update({key: len(args[0])})
            )
    fuse(tower, PAIRS, Need(cls=True))
    assert batch == {
        "text.self_attention.qkv": 7,
        "text.cross_attention.q": 7,
        "text.cross_attention.kv": 2,  # keys of the images
        "text.ffn": 7,
        "image.self_attention.qkv": 2,
        "image.cross_attention.q": 2,
        "image.cross_attention.kv": 7,
        "image.ffn": 7,
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_passes_over_the_same_inputs_share_what_is_theirs_alone(layers):
    """Two passes: the bridge and the self-attention of the first layer run once, unless that layer is also the last;
    outputs and gradients are those of two encodings."""
    tower = make_tower(cross_layers=layers)
    other = PAIRS.flip(0)
    first = [fuse(tower, pairs, Need(cls=True)).cls for pairs in (PAIRS, other)]
    total(*first).backward()
    expected = gradients(tower)
    tower.zero_grad()
    runs = []
    for modality in ("text", "image"):
        attention = getattr(tower.cross, f"{modality}_layers")[0].self_attention
        attention.register_forward_hook(lambda *_, modality=modality: runs.append(modality))
    images, texts = tower.encode_images(make_images(2)), tower.encode_texts(make_texts(7))
    with torch.no_grad():  # leaves nothing behind that would lack gradients
        tower.fuse(images, texts, PAIRS, Need(cls=True))
    runs.clear()
    found = [tower.fuse(images, texts, pairs, Need(cls=True)).cls for pairs in (PAIRS, other)]
    assert sorted(runs) == (["image", "text"] if layers == 2 else ["image", "image", "text", "text"])
    torch.testing.assert_close(found, first, rtol=0, atol=2e-6)
    total(*found).backward()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients(tower).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_rows_in_order_are_not_copied():
    states = torch.randn(3, 2)
    assert rows_or_none(torch.arange(3), 3) is None
    assert gather(states, None) is states
    rows = torch.tensor([0, 2, 1])
    assert rows_or_none(rows, 3) is rows
    assert rows_or_none(torch.arange(2), 3) is not None
    assert torch.equal(gather(states, rows), states[[0, 2, 1]])


def test_padding_changes_nothing():
    """Longer padding of the same texts leaves the outputs as they are."""
    tower = make_tower()
    texts = make_texts(7)
    padded = Texts(
        torch.nn.functional.pad(texts.ids, (0, 4), value=1), torch.nn.functional.pad(texts.mask, (0, 4), value=False)
    )
    images = tower.encode_images(make_images(2))
    short = tower.fuse(images, tower.encode_texts(texts), PAIRS, Need(cls=True)).cls
    long = tower.fuse(images, tower.encode_texts(padded), PAIRS, Need(cls=True)).cls
    torch.testing.assert_close(short, long, rtol=0, atol=2e-6)


@pytest.mark.parametrize("vision_layers, text_layers", [(2, 4), (4, 2)])
def test_depths_may_differ_and_the_top_layers_are_aligned(vision_layers, text_layers):
    tower = make_tower(vision_layers=vision_layers, text_layers=text_layers)
    images, texts = make_images(2), make_texts(7)
    encoded = tower.encode_images(images)
    uni = tower.vision(images, vision_layers)[-2:]
    kind = tower.type_embeddings.weight[1]
    assert len(encoded.states) == 2
    for state, expected in zip(encoded.states, uni, strict=True):
        torch.testing.assert_close(state, tower.image_projection(expected) + kind)
    uni = tower.text(texts.ids, texts.mask, text_layers)[-2:]
    for state, expected in zip(tower.encode_texts(texts).states, uni, strict=True):
        torch.testing.assert_close(state, tower.text_projection(expected) + tower.type_embeddings.weight[0])
    assert fuse(tower, PAIRS, Need(cls=True)).cls.shape == (7, 32)


def test_type_ids_per_image():
    tower = make_tower(token_types=3)
    images = make_images(2)
    mixed = tower.encode_images(images, torch.tensor([1, 2]))
    for row, kind in ((0, 1), (1, 2)):
        alone = tower.encode_images(images[row : row + 1], kind)
        for state, expected in zip(mixed.states, alone.states, strict=True):
            torch.testing.assert_close(state[row], expected[0], rtol=0, atol=2e-6)
    different = tower.encode_images(images, 1).states[0][1] - mixed.states[0][1]
    assert different.abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["cheap", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(dropout, mode):
    found = []
    for chosen in ("none", mode):
        tower = make_tower(dropout=dropout)
        tower.set_gradient_checkpointing(chosen)
        torch.manual_seed(5)
        mask = make_texts(7).mask[PAIRS[:, 1]]
        fused = fuse(tower, PAIRS, Need(cls=True, text=mask))
        total(fused.cls, fused.text).backward()
        found.append((fused.cls, gradients(tower)))
    (plain, expected), (checkpointed, again) = found
    assert torch.equal(plain, checkpointed)
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_full_gradient_checkpointing_recomputes_every_layer():
    """Each block of the encoders and each cross-modal layer runs twice: forward, and again in the backward pass."""
    tower = make_tower()
    tower.set_gradient_checkpointing("full")
    calls = {}
    blocks = {f"vision.{i}": b for i, b in enumerate(tower.vision.visual.transformer.resblocks)}
    blocks |= {f"text.{i}": b.attention for i, b in enumerate(tower.text.model.encoder.layer)}
    blocks |= {f"cross.text.{i}": b for i, b in enumerate(tower.cross.text_layers)}
    blocks |= {f"cross.image.{i}": b for i, b in enumerate(tower.cross.image_layers)}
    for name, block in blocks.items():
        part = block.ffn if name.startswith("cross") else block
        part = part.mlp if name.startswith("vision") else part
        part.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    total(fuse(tower, PAIRS, Need(cls=True)).cls).backward()
    assert calls == dict.fromkeys(blocks, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_full_precision(dtype):
    tower = make_tower()
    mask = make_texts(7).mask[PAIRS[:, 1]]
    full = fuse(tower, PAIRS, Need(cls=True, text=mask))
    with torch.autocast("cpu", dtype):
        low = fuse(tower, PAIRS, Need(cls=True, text=mask))
        assert low.cls.dtype == dtype
    torch.testing.assert_close(low.cls.float(), full.cls, rtol=0, atol=0.05)
    torch.testing.assert_close(low.text.float(), full.text, rtol=0, atol=0.1)
    total(low.cls.float(), low.text.float()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(tower).values())
