"""transformers' BridgeTower classes with random weights against the tower with the same weights."""

import pytest
import torch
from torch import nn
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)

from bt.data.batch import Texts
from bt.errors import CheckpointError
from bt.interop.huggingface import from_huggingface, to_huggingface
from bt.models.bridges.add import AddBridge
from bt.models.bridgetower import BridgeTower, Need
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision
from bt.models.heads import ITMHead, MLMHead

TINY = {"width": 32, "depth": 3, "heads": 2, "cross": 2, "ffn": 64, "vision": 64, "image": 48, "vocabulary": 60}
BASE = {
    "width": 768,
    "depth": 12,
    "heads": 12,
    "cross": 6,
    "ffn": 3072,
    "vision": 768,
    "image": 288,
    "vocabulary": 50265,
}
# The port builds its cross-modal layers and MLM head with RoBERTa's epsilon.
EPS = 1e-5


def configuration(size: dict) -> BridgeTowerConfig:
    return BridgeTowerConfig(
        hidden_size=size["width"],
        num_attention_heads=size["heads"],
        num_hidden_layers=size["cross"],
        layer_norm_eps=EPS,
        # The port draws from N(0, 0.05 * factor), the released code from N(0, 0.02).
        initializer_factor=0.4,
        text_config={
            "vocab_size": size["vocabulary"],
            "hidden_size": size["width"],
            "num_hidden_layers": size["depth"],
            "num_attention_heads": size["heads"],
            "intermediate_size": size["ffn"],
            "max_position_embeddings": 66,
            "layer_norm_eps": EPS,
            "initializer_factor": 0.4,
        },
        vision_config={
            "hidden_size": size["vision"],
            "num_hidden_layers": size["depth"],
            "patch_size": 16,
            "image_size": size["image"],
            "initializer_factor": 0.4,
        },
    )


def own_model(size: dict) -> nn.Module:
    """Tower, MLM and ITM head, of the same sizes."""
    architecture = {"width": size["vision"], "layers": size["depth"], "patch_size": 16, "quick_gelu": True}
    text = {"model_type": "roberta", **configuration(size).text_config.to_dict(), "architectures": None}
    text["model_type"] = "roberta"
    model = nn.Module()
    model.tower = BridgeTower(
        OpenClipVision(image_size=size["image"], architecture=architecture),
        HFText(config=text),
        AddBridge(size["width"], size["cross"]),
        AddBridge(size["width"], size["cross"]),
        CoAttention(size["width"], size["heads"], size["cross"], size["ffn"] / size["width"], norm_eps=EPS),
    )
    heads = {"mlm": MLMHead(size["width"], size["vocabulary"], EPS), "itm": ITMHead(size["width"])}
    model.objectives = nn.ModuleDict({name: nn.ModuleDict({"head": head}) for name, head in heads.items()})
    return model.eval()


def inputs(size: dict, pairs: int) -> tuple[torch.Tensor, Texts]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, 3, size["image"], size["image"], generator=generator)
    ids = torch.randint(5, size["vocabulary"], (pairs, 12), generator=generator)
    mask = torch.ones(pairs, 12, dtype=torch.bool)
    mask[-1, 7:] = False
    return images, Texts(ids.masked_fill(~mask, 1), mask)


def randomise(model: nn.Module) -> None:
    """Norms and biases start at 1 and 0, where a swapped pair of them would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.mark.parametrize("size, pairs", [(TINY, 3), (BASE, 2)], ids=["tiny", "base"])
@torch.no_grad()
def test_states_pooled_output_and_logits(size, pairs):
    torch.manual_seed(0)
    masked = BridgeTowerForMaskedLM(configuration(size)).eval()
    with torch.device("meta"):
        retrieval = BridgeTowerForImageAndTextRetrieval(configuration(size)).eval()
    # Both classes on one trunk, which at base size is nearly all of the memory.
    retrieval.bridgetower = masked.bridgetower
    retrieval.itm_score = type(retrieval.itm_score)(2 * size["width"])
    randomise(masked)
    randomise(retrieval.itm_score)
    images, texts = inputs(size, pairs)
    arguments = {"input_ids": texts.ids, "attention_mask": texts.mask.long(), "pixel_values": images}
    trunk = []
    hook = masked.bridgetower.register_forward_hook(lambda _, args, output: trunk.append(output))
    mlm = masked(**arguments, output_hidden_states=True).logits
    hook.remove()
    itm = retrieval(**arguments).logits

    ours = own_model(size)
    ours.load_state_dict(from_huggingface({**masked.state_dict(), **retrieval.state_dict()}))
    del masked, retrieval
    crossed = {"text": [], "image": []}
    for modality, found in crossed.items():
        for layer in getattr(ours.tower.cross, f"{modality}_layers"):
            # The first layer is called for its self-attention alone before.
            layer.register_forward_hook(
                lambda _, args, output, found=found: None if args[1] is None else found.append(output)
            )
    encoded = ours.tower.encode_images(images), ours.tower.encode_texts(texts)
    fused = ours.tower.fuse(*encoded, torch.arange(pairs)[:, None].expand(-1, 2), Need(True, True, True))

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    assert len(trunk[0].hidden_states[2]) == size["cross"]
    for i, (text, image) in enumerate(trunk[0].hidden_states[2]):
        close(crossed["text"][i], text)
        close(crossed["image"][i], image)
    close(fused.text, trunk[0].text_features)
    close(fused.image, trunk[0].image_features)
    close(fused.cls, trunk[0].pooler_output)
    close(ours.objectives["mlm"]["head"](fused.text), mlm)
    close(ours.objectives["itm"]["head"](fused.cls), itm)


def test_export_is_loaded_strictly_but_for_the_unused_pooler():
    """to_huggingface of a fresh model fills every tensor of the port except RoBERTa's pooler, which is never used."""
    state = own_model(TINY).state_dict()
    masked = BridgeTowerForMaskedLM(configuration(TINY))
    exported = {key: tensor for key, tensor in to_huggingface(state).items() if not key.startswith("itm_score")}
    result = masked.load_state_dict(exported, strict=False)
    assert result.unexpected_keys == []
    assert all("text_model.pooler" in key for key in result.missing_keys)
    bare = BridgeTowerModel(configuration(TINY)).load_state_dict(to_huggingface(state, bare=True), strict=False)
    assert bare.unexpected_keys == []
    assert all("text_model.pooler" in key for key in bare.missing_keys)
    again = from_huggingface(to_huggingface(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_temperature_is_stored_as_a_logarithm():
    state = from_huggingface({"logit_scale": torch.tensor(2.6593)})
    assert state["objectives.itc.temperature"].item() == pytest.approx(0.07, rel=1e-4)
    back = to_huggingface(state)
    assert back["logit_scale"].item() == pytest.approx(2.6593, rel=1e-5)


def test_numbers_of_link_towers_are_one_tensor_for_a_bridge():
    names = [f"bridgetower.cross_modal_text_link_tower.{layer}.scaled_factor" for layer in (1, 0)]
    state = from_huggingface({names[0]: torch.tensor(3.0), names[1]: torch.tensor(2.0)})
    assert state["tower.text_bridge.scale"].tolist() == [2, 3]
    assert to_huggingface(state) == {names[0]: 3, names[1]: 2}


def test_unknown_keys_are_named():
    with pytest.raises(CheckpointError, match="cross_modal_text_link_tower.0.gate"):
        from_huggingface({"bridgetower.cross_modal_text_link_tower.0.gate": torch.ones(1)})
