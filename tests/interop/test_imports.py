"""Checkpoints of other programs: recognised, mapped to the last tensor, and models with the same outputs."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerImageProcessor,
    BridgeTowerModel,
)

from bt.data.batch import Texts
from bt.errors import CheckpointError, ConfigError
from bt.interop.export_released import export_released
from bt.interop.export_transformers import export_transformers
from bt.interop.folder import build, read_folder, write_folder
from bt.interop.imports import import_source, read_labels
from bt.interop.load import load_model
from bt.interop.source import open_source
from tests.golden_helpers import FOLDERS, GOLDEN, golden_batch, table, tensors
from tests.interop.models import fused, inputs, released_file, save_transformers, tokenizer, tower_of

HEADS = {"encoder.text.config.num_attention_heads": 4}
CLASSES = (
    BridgeTowerModel,
    BridgeTowerForMaskedLM,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForContrastiveLearning,
)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key].dtype != wanted[key].dtype] == []
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize("case", FOLDERS)
def test_a_released_file_gives_its_outputs_and_comes_back_bit_for_bit(case, tmp_path):
    """BridgeTower, METER, its fusion, both managers: through the folder on the disk."""
    released = released_file(case, tmp_path / "model.ckpt")
    made, rows = import_source(open_source(tmp_path / "model.ckpt"), changes=HEADS)
    assert sum(row.tensors for row in rows if row.what == "mapped") == len(made.state)
    write_folder(made, tmp_path / "folder")
    again = read_folder(tmp_path / "folder")
    batch = golden_batch()
    found = fused(tower_of(again), batch["image"], Texts(batch["text_ids"], batch["text_masks"].bool()))
    wanted = tensors(f"{FOLDERS[case]}/infer/outputs")
    for name, own in (("cls_feats", found.cls), ("text_feats", found.text), ("image_feats", found.image)):
        torch.testing.assert_close(own, wanted[name], rtol=0, atol=1e-5)
    export_released(again, tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    equal(back["state_dict"], released)
    original = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert back["hyper_parameters"] == original["hyper_parameters"]
    # The heads of the text encoder, which the file does not say, are kept too.
    third, _ = import_source(open_source(tmp_path / "back.ckpt"))
    assert third.nodes == made.nodes


def test_an_export_has_the_keys_and_shapes_of_the_released_checkpoint(tmp_path):
    released_file("add", tmp_path / "model.ckpt")
    made, _ = import_source(open_source(tmp_path / "model.ckpt"), changes=HEADS)
    export_released(made, tmp_path / "back.ckpt")
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)
    expected = table("bridgetower/checkpoint")
    shapes = {key: [str(t.dtype).removeprefix("torch."), [*t.shape]] for key, t in content["state_dict"].items()}
    assert shapes == expected["state_dict"]
    assert set(expected["top_level"]) <= content.keys()


@pytest.mark.parametrize("image_size", [24, 40])
def test_a_whole_training_checkpoint(image_size, tmp_path):
    """Written by Lightning after two steps: optimizer, scheduler, callbacks; read at another image size too."""
    path = GOLDEN / "bridgetower_import/official_training.ckpt"
    made, rows = import_source(open_source(path), changes={"encoder.text.config.num_attention_heads": 2})
    [training] = [row.part for row in rows if row.what == "dropped"]
    assert training == "epoch, global_step, callbacks, optimizer_states, lr_schedulers"
    assert made.nodes["cross"]["heads"] == 4 and made.nodes["cross"]["ffn_ratio"] == 3
    assert made.nodes["encoder"]["vision"]["image_size"] == 24
    made.nodes["encoder"]["vision"]["image_size"] = image_size
    model = build(made).eval()
    tower = {k.removeprefix("tower."): v for k, v in made.state.items() if k.startswith("tower.")}
    model.tower.load_state_dict(model.tower.adapt_state(tower))
    model.load_state_dict({k: v for k, v in made.state.items() if k.startswith("objectives.")}, strict=False)
    batch = golden_batch("bridgetower_import/batch")
    images = batch["image"][:, :, :image_size, :image_size]
    found = fused(model.tower, images, Texts(batch["text_ids"], batch["text_masks"].bool()))
    wanted = tensors(f"bridgetower_import/outputs{'_same_size' if image_size == 24 else ''}")
    pairs = {
        "cls_feats": found.cls,
        "text_feats": found.text,
        "image_feats": found.image,
        "mlm_logits": model.objectives["mlm"].head(found.text),
        "itm_logits": model.objectives["itm"].head(found.cls),
        "position_table": model.tower.vision.visual.positional_embedding,
    }
    for name, own in pairs.items():
        torch.testing.assert_close(own, wanted[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "kind, link", [*((kind, "add") for kind in CLASSES), (CLASSES[3], "scaled_add"), (CLASSES[3], "interpolate")]
)
@torch.no_grad()
def test_transformers_classes_there_and_back(kind, link, tmp_path):
    theirs = save_transformers(kind, tmp_path / "theirs", link_tower_type=link)
    loaded = load_model(tmp_path / "theirs")
    assert loaded.model.tower.cross.text_layers[0].ffn.norm.eps == 3e-6
    assert loaded.model.tower.text_bridge.norms[1].eps == 2e-5
    images, texts = inputs(24)
    given = {"input_ids": texts.ids, "attention_mask": texts.mask.long(), "pixel_values": images}
    found = fused(loaded.model.tower, images, texts)
    objectives = loaded.model.objectives
    expected = theirs(**given)
    if kind is BridgeTowerModel:
        own = found.cls, expected.pooler_output
    elif kind is BridgeTowerForMaskedLM:
        assert objectives["mlm"].head.norm.eps == 2e-5
        own = objectives["mlm"].head(found.text), expected.logits
    elif kind is BridgeTowerForImageAndTextRetrieval:
        own = objectives["itm"].head(found.cls), expected.logits
    else:
        assert objectives["contrastive"].logit_scale == theirs.logit_scale
        own = objectives["contrastive"].cross_head(found.cls), expected.cross_embeds
    torch.testing.assert_close(*own, rtol=0, atol=1e-5)
    made, _ = import_source(open_source(tmp_path / "theirs"))
    export_transformers(made, tmp_path / "back")
    again = kind.from_pretrained(tmp_path / "back")
    equal(again.state_dict(), theirs.state_dict())
    equal(open_source(tmp_path / "back").tensors, open_source(tmp_path / "theirs").tensors)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "theirs/config.json").read_text()
    )


def test_pytorch_bin_and_old_buffers(tmp_path):
    """A folder of an older release: a pickle, constant buffers, the tied decoder bias, a lone logit_scale."""
    theirs = save_transformers(BridgeTowerForMaskedLM, tmp_path)
    state = dict(theirs.state_dict())
    state["bridgetower.text_model.embeddings.position_ids"] = torch.arange(34)[None]
    state["mlm_score.decoder.bias"] = state["mlm_score.bias"]
    state["logit_scale"] = torch.tensor(2.5)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    made, rows = import_source(open_source(tmp_path))
    assert {row.part for row in rows if row.what == "kept"} >= {"logit_scale", "mlm_score.decoder.bias"}
    export_transformers(made, tmp_path / "back")
    equal(open_source(tmp_path / "back").tensors, state)
    torch.save({**state, "mlm_score.decoder.bias": state["mlm_score.bias"] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="mlm_score.decoder.bias and mlm_score.bias differ"):
        import_source(open_source(tmp_path))


def test_a_tied_decoder_is_copied_and_said(tmp_path):
    theirs = save_transformers(BridgeTowerForMaskedLM, tmp_path, tie_word_embeddings=True)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path)
    made, rows = import_source(open_source(tmp_path))
    words = made.state["tower.text.model.embeddings.word_embeddings.weight"]
    assert torch.equal(made.state["objectives.mlm.head.decoder.weight"], words)
    assert any("tied to the word table" in row.note for row in rows)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"share_cross_modal_transformer_layers": False}, "share_cross_modal_transformer_layers=false"),
        ({"hidden_act": "relu"}, "another hidden_act"),
    ],
)
def test_what_transformers_has_and_the_model_here_has_not(options, said, tmp_path):
    save_transformers(BridgeTowerModel, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | options))
    with pytest.raises(CheckpointError, match=said):
        import_source(open_source(tmp_path))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean=\[0.5, 0.5, 0.5\], the image encoder here takes \(0.48145466"),
        ({"image_std": 0.5}, "image_std=0.5"),
        ({"do_normalize": False}, "do_normalize=False, the image encoder here takes True"),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config", "processor_config"])
def test_images_that_are_prepared_otherwise_are_refused(name, changes, said, tmp_path):
    save_transformers(BridgeTowerModel, tmp_path)
    images = BridgeTowerImageProcessor(size={"shortest_edge": 24}, crop_size={"shortest_edge": 24}).to_dict()
    for given in (images, images | changes):
        content = {"image_processor": given} if name == "processor_config" else given
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        if given is images:
            _, rows = import_source(open_source(tmp_path))
            assert [row for row in rows if row.part == "image processor"] == []
    with pytest.raises(CheckpointError, match=f"{tmp_path}: its image processor has {said}"):
        load_model(tmp_path)


def test_another_size_of_images_is_said(tmp_path):
    save_transformers(BridgeTowerModel, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "crop_size": {"height": 24}}))
    made, rows = import_source(open_source(tmp_path))
    assert made.nodes["encoder"]["vision"]["image_size"] == 24
    [note] = [row.note for row in rows if row.part == "image processor"]
    assert note == "size is 32 there; here it is 24, as the weights' position table has it"


def test_nothing_is_dropped_unless_it_is_explained(tmp_path):
    state = released_file("add", tmp_path / "model.ckpt")
    state["mpp_score.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "more.safetensors")
    source = open_source(tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="no counterpart here: mpp_score.bias"):
        import_source(source, changes=HEADS)
    made, rows = import_source(source, changes=HEADS, dropped=["mpp_*"])
    assert torch.equal(made.unused["mpp_score.bias"], state["mpp_score.bias"])
    assert [row.note for row in rows if row.part == "mpp_score.bias"] == ["as asked by --drop"]
    with pytest.raises(CheckpointError, match="--drop vcr_.*: no tensor"):
        import_source(source, dropped=["mpp_*", "vcr_*"])
    del state["mpp_score.bias"], state["cross_modal_text_pooler.dense.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match="tower.text_pooler.dense.bias: has nothing, needs"):
        import_source(open_source(tmp_path / "less.safetensors"), changes=HEADS)
    with pytest.raises(ConfigError, match="--set cross.depth: the model's configuration has no such key"):
        import_source(open_source(tmp_path / "model.ckpt"), changes={"cross.depth": 4})


def test_heads_labels_and_tokenizer(tmp_path):
    """A fine-tuned file: the answers are not in it."""
    weights = tensors("bridgetower/weights")
    state = {k: v for k, v in weights.items() if not k.startswith(("mlm_score", "itm_score", "itc_", "nlvr2", "snli"))}
    torch.save({"state_dict": state}, tmp_path / "vqa.ckpt")
    loaded = load_model(tmp_path / "vqa.ckpt")
    assert loaded.model.objectives["vqa"].answers[3] == "answer 3" and loaded.labels == {}
    assert loaded.config.task.texts == "questions" and loaded.tokenizer is None
    names = [f"word{i}" for i in range(10)]
    loaded = load_model(tmp_path / "vqa.ckpt", labels={"answers": names})
    assert loaded.model.objectives["vqa"].answers == names == loaded.labels["answers"]
    with pytest.raises(CheckpointError, match="the head vqa has 10 rows, the labels 'answers' are 9"):
        load_model(tmp_path / "vqa.ckpt", labels={"answers": names[:9]})
    assert [*load_model(tmp_path / "vqa.ckpt", leave_out=["vqa"]).model.objectives] == []
    tokenizer().save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="the tokenizer has 30 tokens, the word table 120 rows"):
        load_model(tmp_path / "vqa.ckpt", tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "index.json").write_text(json.dumps({"labels": {"answers": names}}))
    assert read_labels(tmp_path) == {"answers": names}
    state = {k: v for k, v in weights.items() if not k.startswith(("mlm_score", "itm_score", "itc_", "vqa", "nlvr2"))}
    torch.save(state, tmp_path / "snli.ckpt")
    assert load_model(tmp_path / "snli.ckpt").labels == {"classes": ["contradiction", "neutral", "entailment"]}
    state |= {k: v for k, v in weights.items() if k.startswith("nlvr2")}
    torch.save(state, tmp_path / "both.ckpt")
    with pytest.raises(CheckpointError, match="leave the head out by --leave-out nlvr2"):
        load_model(tmp_path / "both.ckpt")


def test_names_and_files_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing by hand into a folder"):
        open_source("nobody/nothing")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="has no weights: looked for model.safetensors"):
        open_source(tmp_path)
    save_file({"layer.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="none of the known formats"):
        import_source(open_source(tmp_path / "other.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        open_source(tmp_path)
