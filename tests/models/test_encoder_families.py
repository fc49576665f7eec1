"""Image encoders of timm and text encoders of transformers in a tower; freezing, learning rates by layer."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import nn
from transformers import CLIPConfig, CLIPModel

from bt.config import OptimizerConfig
from bt.engine.optimizer import build_optimizer
from bt.errors import ConfigError
from bt.models.bridges.add import AddBridge
from bt.models.bridgetower import BridgeTower, Need, build_tower
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision
from bt.models.encoders.timm_model import TimmModel
from bt.tasks.base import TaskModel
from tests.models.towers import TEXT, VISION, make_texts, make_tower

VIT = {"depth": 3, "embed_dim": 24, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 2}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
# name: size, options, image tokens with the first, depth
FAMILIES = {
    "vit_base_patch16_siglip_224": (64, VIT, 17, 3),
    "vit_base_patch14_dinov2": (56, VIT, 17, 3),
    "vit_base_patch14_reg4_dinov2": (56, VIT, 21, 3),
    "deit_base_patch16_224": (64, VIT, 17, 3),
    "vit_base_patch32_clip_224": (64, VIT, 5, 3),
    "swin_base_patch4_window7_224": (64, SWIN, 5, 6),
    "convnext_base": (64, CONVNEXT, 5, 5),
}
SIZES = {key: value for key, value in TEXT.items() if key not in ("model_type", "type_vocab_size", "layer_norm_eps")}
TEXTS = {
    "bert": {},
    "deberta-v2": {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
    "electra": {"embedding_size": 12},
    "modernbert": {"bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2},
    "clip_text_model": {"bos_token_id": 0, "eos_token_id": 2},
}


def vision(name: str, **changes) -> TimmModel:
    size, options, *_ = FAMILIES[name]
    torch.manual_seed(0)
    return TimmModel(**{"name": name, "pretrained": False, "image_size": size, "options": options, **changes})


def text(kind: str, **changes) -> HFText:
    torch.manual_seed(0)
    return HFText(config={**SIZES, **TEXTS[kind], "model_type": kind, "pad_token_id": 1}, **changes)


def trains(tower: BridgeTower) -> None:
    """Three steps lower the loss and reach every parameter, but for those that only the lower layers' states use."""
    images = torch.randn(2, 3, tower.vision.image_size, tower.vision.image_size)
    texts, pairs = make_texts(3), torch.tensor([[0, 0], [1, 1], [0, 2]])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        fused = tower.fuse(tower.encode_images(images), tower.encode_texts(texts), pairs, Need(cls=True))
        loss = F.mse_loss(fused.cls, torch.linspace(-1, 1, fused.cls.numel()).view_as(fused.cls))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unreached = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    assert {name for name in unreached if not name.startswith("vision.widen.")} == set()


def tower_of(image: nn.Module, words: nn.Module) -> BridgeTower:
    torch.manual_seed(0)
    return BridgeTower(image, words, AddBridge(16, 2), AddBridge(16, 2), CoAttention(16, 2, 2, dropout=0.0))


@pytest.mark.parametrize("name", FAMILIES)
def test_image_encoders_train_in_a_tower(name):
    _, _, tokens, depth = FAMILIES[name]
    encoder = vision(name)
    assert (encoder.tokens, encoder.depth, encoder.width) == (tokens, depth, 64 if "swin" in name else 24)
    size = encoder.image_size
    states = encoder(torch.randn(2, 3, size, size), depth)
    assert [state.shape for state in states] == [(2, tokens, encoder.width)] * depth
    trains(tower_of(encoder, text("bert")))


@pytest.mark.parametrize("kind", TEXTS)
def test_text_encoders_train_in_a_tower(kind):
    trains(tower_of(vision("deit_base_patch16_224"), text(kind, cls="last" if "clip" in kind else "first")))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_last_state_is_timms_own(name):
    encoder = vision(name).eval()
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    expected = encoder.visual.forward_features(images)
    if "convnext" in name:
        expected = encoder.visual.head.norm(expected).permute(0, 2, 3, 1)
    expected = expected.flatten(1, -2) if expected.dim() == 4 else expected
    found = encoder(images, 1)[0]
    if not encoder.prefix_tokens:
        torch.testing.assert_close(found[:, 0], expected.mean(1), rtol=0, atol=1e-6)
        found = found[:, 1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["cheap", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(name, mode):
    encoder = vision(name).train()
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    found = []
    for chosen in ("none", mode):
        encoder.set_gradient_checkpointing(chosen)
        encoder.zero_grad()
        torch.manual_seed(0)  # Swin leaves blocks out at random
        sum(state.square().sum() for state in encoder(images, 2)).backward()
        found.append({key: p.grad.clone() for key, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


@torch.no_grad()
def test_weights_of_a_file_at_another_size(tmp_path):
    """The position table is resized as timm does it, from a file at the start and from a checkpoint later."""
    small = vision("vit_base_patch16_siglip_224").eval()
    save_file(small.visual.state_dict(), tmp_path / "weights.safetensors")
    large = vision("vit_base_patch16_siglip_224", pretrained=str(tmp_path / "weights.safetensors"), image_size=96)
    assert large.visual.pos_embed.shape == (1, 36, 24)
    adapted = large.adapt(small.state_dict())
    torch.testing.assert_close(adapted["visual.pos_embed"], large.visual.pos_embed)
    same = vision("vit_base_patch16_siglip_224", pretrained=str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), small.state_dict().values(), strict=True))
    assert load_state_dict(str(tmp_path / "weights.safetensors")).keys() == small.visual.state_dict().keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "vit_huge_patch1"}, "encoder.vision.name=vit_huge_patch1 is no model of timm"),
        ({"name": "resnet50"}, "encoder.vision.name=resnet50 has no blocks in a row; ViTs, Swin and ConvNeXt have"),
        ({"name": "deit_base_patch16_224", "options": {"deep": 3}}, "encoder.vision.options=.*deep"),
        ({"name": "deit_base_patch16_224", "pretrained": "none.safetensors"}, "pretrained=none.safetensors is no file"),
        ({"name": "deit_base_patch16_224", "image_size": 60}, "image_size=60 is not divisible by the patch size 16"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TimmModel(**{"pretrained": False, **arguments})


def test_weights_that_cannot_be_had_say_what_to_fetch(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match="by hand") as caught:
        TimmModel("vit_base_patch16_siglip_224.webli")
    assert "huggingface.co/timm/vit_base_patch16_siglip_224.webli" in str(caught.value)


@torch.no_grad()
def test_the_last_token_stands_for_a_text_read_from_left_to_right():
    encoder, texts = text("clip_text_model", cls="last").eval(), make_texts(3)
    plain = text("clip_text_model").eval()
    for found, expected in zip(encoder(texts.ids, texts.mask, 2), plain(texts.ids, texts.mask, 2), strict=True):
        ends = texts.mask.sum(1) - 1
        assert torch.equal(found[:, 0], expected[torch.arange(3), ends])
        assert torch.equal(found[:, 1:], expected[:, 1:])


def test_the_text_tower_of_a_local_clip(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    words = {**sizes, "vocab_size": 50, "max_position_embeddings": 20, "eos_token_id": 2, "pad_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config={**sizes, "image_size": 16, "patch_size": 8}))
    model.save_pretrained(tmp_path)
    encoder = HFText(str(tmp_path), vocab_size=50, cls="last")
    assert encoder.depth == 2
    assert torch.equal(
        encoder.model.state_dict()["embeddings.token_embedding.weight"],
        model.text_model.embeddings.token_embedding.weight,
    )


def frozen(encoder: nn.Module) -> set[int]:
    return {encoder.layer_of(name) for name, parameter in encoder.named_parameters() if not parameter.requires_grad}


ENCODERS = {
    "open_clip": lambda: OpenClipVision(image_size=24, architecture=VISION),
    **{name: lambda name=name: vision(name) for name in FAMILIES},
    **{kind: lambda kind=kind: text(kind) for kind in TEXTS},
}


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_layers_of_parameters_and_freezing(make):
    encoder = make()
    depth = encoder.depth
    layers = {encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    # Some text encoders have no norm behind their last block.
    assert layers - {depth + 1} == set(range(depth + 1))
    encoder.freeze("none", "encoder")
    assert frozen(encoder) == set()
    encoder.freeze("bottom:1", "encoder")
    assert frozen(encoder) == {0, 1}
    encoder.freeze("all", "encoder")
    assert frozen(encoder) == layers
    with pytest.raises(ConfigError, match=f"encoder.freeze=bottom:9: .* none, all, bottom:N with N from 0 to {depth}"):
        encoder.freeze("bottom:9", "encoder")


def test_freezing_by_configuration():
    text_config = {"_target_": "bt.models.encoders.hf_text.HFText", "config": TEXT, "freeze": "bottom:2"}
    image_config = {
        "_target_": "bt.models.encoders.open_clip_vit.OpenClipVision",
        "image_size": 24,
        "architecture": VISION,
    }
    cross = {"_target_": "bt.models.cross_modal.CoAttention", "width": 16, "heads": 2, "layers": 2}
    encoders = {"vision": {**image_config, "freeze": "all"}, "text": text_config}
    bridge = {"_target_": "bt.models.bridges.add.AddBridge"}
    tower = build_tower(encoders, bridge, cross, vocab_size=50)
    assert not any(p.requires_grad for p in tower.vision.parameters())
    assert frozen(tower.text) == {0, 1, 2}
    assert all(p.requires_grad for name, p in tower.named_parameters() if not name.startswith(("vision.", "text.")))


def test_learning_rates_decay_by_layer():
    model = TaskModel(make_tower(), {})
    cfg = OptimizerConfig(lr=1.0, cross_multiplier=5.0, layer_decay=0.5)
    rates = {
        name: group["peak_lr"] for group in build_optimizer(model, cfg).param_groups for name in group["param_names"]
    }
    assert rates["tower.vision.visual.ln_post.weight"] == 1.0
    assert rates["tower.vision.visual.transformer.resblocks.2.ln_1.weight"] == 0.5
    assert rates["tower.text.model.encoder.layer.0.output.dense.weight"] == 0.125
    assert rates["tower.text.model.embeddings.word_embeddings.weight"] == 0.0625
    assert rates["tower.type_embeddings.weight"] == 1.0
    assert rates["tower.text_pooler.dense.weight"] == 5.0
    plain = build_optimizer(model, OptimizerConfig(lr=1.0)).param_groups
    assert [(group["role"], group["peak_lr"], group["weight_decay"]) for group in plain] == [
        ("base", 1.0, 0.01),
        ("base", 1.0, 0.0),
        ("cross", 5.0, 0.01),
        ("cross", 5.0, 0.0),
    ]
