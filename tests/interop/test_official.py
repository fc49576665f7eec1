"""Released state dicts, there and back."""

import pytest
import torch

from bt.errors import CheckpointError
from bt.interop.official import from_official, to_official, unused
from tests.golden_helpers import golden_state, golden_tower, table, tensors


def test_round_trip_returns_every_tensor():
    released = tensors("bridgetower/weights")
    state = from_official(released)
    back = to_official(state) | unused(released)
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in released)
    # Text pooler (2), CLIP's text position table and final norm (3), position ids.
    assert len(unused(released)) == 6


def test_fused_maps_stack_query_key_value():
    released = tensors("bridgetower/weights")
    state = from_official(released)
    layer = "cross_modal_text_layers.1"
    parts = [released[f"{layer}.attention.self.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(state["tower.cross.text_layers.1.self_attention.qkv.weight"], torch.cat(parts))
    parts = [released[f"{layer}.crossattention.self.{part}.bias"] for part in ("key", "value")]
    assert torch.equal(state["tower.cross.text_layers.1.cross_attention.kv.bias"], torch.cat(parts))


def test_bridge_norms_count_from_the_first_layernorm():
    released = tensors("bridgetower/weights")
    state = from_official(released)
    assert torch.equal(state["tower.image_bridge.norms.0.weight"], released["cross_modal_image_layernorm.weight"])
    assert torch.equal(
        state["tower.image_bridge.norms.2.weight"], released["cross_modal_image_link_tower.1.LayerNorm.weight"]
    )


@pytest.mark.parametrize("bridge", ["add", "none"])
def test_every_tensor_of_a_tower_has_a_released_one(bridge):
    """Loading is strict both ways: the tower's names are exactly the released trunk's."""
    tower = {f"tower.{key}" for key in golden_tower(bridge).state_dict()}
    assert {key for key in golden_state(bridge) if key.startswith("tower.")} == tower


def test_keys_of_a_released_training_checkpoint():
    entries = table("bridgetower/checkpoint")["state_dict"]
    state = from_official({key: torch.zeros(shape) for key, (_, shape) in entries.items()})
    exported = to_official(state)
    assert exported.keys() == {key for key in entries if key not in unused(dict.fromkeys(entries))}
    assert all(list(exported[key].shape) == entries[key][1] for key in exported)


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(CheckpointError, match="cross_modal_text_layers.0.attention.self.gate.weight"):
        from_official({"cross_modal_text_layers.0.attention.self.gate.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="missing of: tower.cross.image_layers.3.cross_attention.kv.bias"):
        from_official({"cross_modal_image_layers.3.crossattention.self.key.bias": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="tower.vision.visual.blocks.0.norm1.weight"):
        to_official({"tower.vision.visual.blocks.0.norm1.weight": torch.zeros(4)})
