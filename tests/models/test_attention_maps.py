"""The attention maps of the cross-modal layers, against transformers' and against what a forward pass computes."""

from __future__ import annotations

import pytest
import torch
from transformers import BridgeTowerForMaskedLM

from bt.assemble import build_model
from bt.data.text import train_tokenizer
from bt.interop.huggingface import from_huggingface
from bt.models import cross_modal
from bt.models.attention import probabilities
from bt.models.bridgetower import Need
from tests.interop.test_huggingface import TINY, configuration, inputs, own_model, randomise
from tests.models.towers import make_images, make_texts
from tests.test_config import composed


@torch.no_grad()
def test_maps_are_those_of_transformers():
    torch.manual_seed(0)
    config = configuration(TINY)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    theirs = BridgeTowerForMaskedLM(config).eval()
    randomise(theirs)
    found: dict[str, list[torch.Tensor]] = {"text": [], "image": []}
    trunk = theirs.bridgetower
    for modality, maps in found.items():
        for layer in getattr(trunk, f"cross_modal_{modality}_layers"):
            layer.crossattention.register_forward_hook(lambda _, args, output, maps=maps: maps.append(output[1]))
    images, texts = inputs(TINY, 3)
    theirs(input_ids=texts.ids, attention_mask=texts.mask.long(), pixel_values=images)
    ours = own_model(TINY)
    state = from_huggingface(
        {**theirs.state_dict(), "itm_score.fc.weight": torch.zeros(2, 64), "itm_score.fc.bias": torch.zeros(2)}
    )
    ours.load_state_dict(state)
    encoded = ours.tower.encode_images(images), ours.tower.encode_texts(texts)
    maps = ours.tower.attention_maps(*encoded, torch.arange(3)[:, None].expand(-1, 2))
    assert len(maps) == len(found["text"]) == TINY["cross"]
    for layer, text, image in zip(maps, found["text"], found["image"], strict=True):
        torch.testing.assert_close(layer.text_to_image, text, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.image_to_text, image, rtol=0, atol=1e-5)
        assert layer.image_to_text[2, :, :, 7:].eq(0).all()  # padding


def of_shape(seen: list[torch.Tensor], queries: int, keys: int) -> list[torch.Tensor]:
    """Those of cross-attention in one direction, layer by layer: texts and images differ in length."""
    return [maps for maps in seen if maps.shape[2:] == (queries, keys)]


@pytest.mark.parametrize("bridge", ["add", "adaptive_managers"])
@pytest.mark.parametrize("cross", ["tiny", "merged", "asymmetric"])
@torch.no_grad()
def test_maps_are_what_the_forward_pass_weighs_by(bridge, cross, monkeypatch):
    sizes = ["cross.width=32", "cross.heads=2", "cross.layers=2"]
    cfg = composed("encoder=tiny", f"cross={cross}", *sizes, f"bridge={bridge}", "task=pretrain")
    if bridge == "adaptive_managers":
        cfg.bridge["managed"] = 2
    model = build_model(cfg, train_tokenizer(["a b c d e f g h"]), {})
    tower = model.tower.eval()
    texts = make_texts(3)
    texts.ids.remainder_(tower.text.vocab_size)
    side = tower.vision.image_size
    images = torch.nn.functional.interpolate(make_images(2), size=(side, side))
    encoded = tower.encode_images(images), tower.encode_texts(texts)
    pairs = torch.tensor([[1, 0], [0, 1], [1, 2], [0, 0]])
    seen = []
    inner = cross_modal.attend

    def attend(query, keys, values, mask, dropout):
        seen.append(probabilities(query, keys, mask))
        return inner(query, keys, values, mask, dropout)

    monkeypatch.setattr(cross_modal, "attend", attend)
    monkeypatch.setattr(cross_modal.Attention, "folding", False)  # folded products have no such call
    tower.fuse(*encoded, pairs, Need(True, True, True))
    monkeypatch.undo()
    tokens, patches = texts.ids.shape[1], encoded[0].states[0].shape[1]
    maps = tower.attention_maps(*encoded, pairs)
    for number, layer in enumerate(maps):
        if cross == "merged":
            (both,) = seen[number : number + 1]
            expected = both[:, :, :tokens, tokens:], both[:, :, tokens:, :tokens]
        elif cross == "asymmetric":
            expected = of_shape(seen, tokens, patches)[number], None
        else:
            expected = of_shape(seen, tokens, patches)[number], of_shape(seen, patches, tokens)[number]
        for got, wanted in zip((layer.text_to_image, layer.image_to_text), expected, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                assert got.shape[0] == len(pairs)
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert len(maps) == 2
    tower.train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        tower.attention_maps(*encoded, pairs)
