"""Models trained here in other programs' formats: equal outputs there, and what a format cannot hold is said."""

import json
import resource
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)

from bt.errors import CheckpointError
from bt.interop.export_released import export_released
from bt.interop.export_transformers import compare_transformers, export_transformers
from bt.interop.folder import build, read_folder, write_folder
from bt.interop.graphs import export_graphs
from bt.interop.imports import import_source
from bt.interop.source import open_source
from tests.interop.models import bundle, fused, inputs, objective, tower_of
from tests.interop.test_imports import equal

CONTRASTIVE = objective("contrastive", "bt.tasks.contrastive.Contrastive", size=16)
ITC = objective("itc", "bt.tasks.itc.ITC", size=16)
NLVR2 = objective("nlvr2", "bt.tasks.nlvr2.NLVR2")
VQA = objective("vqa", "bt.tasks.vqa.VQA")
SAME_EPS = {"cross__norm_eps": 1e-5, "task__objectives__mlm__norm_eps": 1e-5}


@torch.no_grad()
def test_four_classes_of_transformers_give_the_same_outputs(tmp_path):
    made = bundle(**SAME_EPS)
    export_transformers(made, tmp_path / "trunk")
    contrast = bundle(cross__norm_eps=1e-5, **CONTRASTIVE)
    export_transformers(contrast, tmp_path / "contrast")
    images, texts = inputs(24)
    given = {"input_ids": texts.ids, "attention_mask": texts.mask.long(), "pixel_values": images}
    model, found = build(made), fused(tower_of(made), images, texts)
    model.load_state_dict(made.state)
    pooled = BridgeTowerModel.from_pretrained(tmp_path / "trunk").eval()(**given).pooler_output
    mlm = BridgeTowerForMaskedLM.from_pretrained(tmp_path / "trunk").eval()(**given).logits
    itm = BridgeTowerForImageAndTextRetrieval.from_pretrained(tmp_path / "trunk").eval()(**given).logits
    other = BridgeTowerForContrastiveLearning.from_pretrained(tmp_path / "contrast").eval()(**given)
    theirs, tower = build(contrast).eval(), tower_of(contrast)
    theirs.load_state_dict(contrast.state)
    head = theirs.objectives["contrastive"]
    pairs = (
        (found.cls, pooled),
        (model.objectives["mlm"].head(found.text), mlm),
        (model.objectives["itm"].head(found.cls), itm),
        (head.text_features(tower.encode_texts(texts)), other.text_embeds),
        (head.image_features(tower.encode_images(images)), other.image_embeds),
        (head.cross_head(fused(tower, images, texts).cls), other.cross_embeds),
    )
    for own, exported in pairs:
        assert own.abs().max() > 0.01
        torch.testing.assert_close(own, exported, rtol=0, atol=1e-5)
    assert all(float(row.note.split()[-1]) < 1e-5 for row in compare_transformers(made, tmp_path / "trunk"))


def test_processor_files(tmp_path):
    """The tokenizer gives the same ids; images are resized and cropped to the model's size."""
    made = bundle(**SAME_EPS)
    export_transformers(made, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    pixels = torch.randint(0, 255, (3, 31, 47), dtype=torch.uint8)
    batch = processor(images=[pixels], text=["how many red dots"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 24, 24)
    assert torch.equal(batch["input_ids"], made.tokenizer.batch(["how many red dots"], 20).ids)
    made.tokenizer = None
    made.nodes["encoder"]["text"]["tokenizer"]["name"] = "some/name"
    rows = export_transformers(made, tmp_path / "without")
    [said] = [row for row in rows if row.part == "processor"]
    assert "no tokenizer at hand (some/name)" in said.note and "--tokenizer" in said.note
    assert (tmp_path / "without/preprocessor_config.json").is_file() or (
        tmp_path / "without/processor_config.json"
    ).is_file()


@pytest.mark.parametrize("form", ["hf", "official"])
def test_everything_survives_a_format(form, tmp_path):
    """Tensors, label maps, epsilons, heads, text length, the table of another image size, the temperature."""
    labels = {"answers": [f"word{i}" for i in range(7)]} if form == "official" else {}
    changes = {"cross__norm_eps": 3e-6, "encoder__vision__image_size": 40, "data__max_text_len": 17}
    if form == "official":
        changes |= {"encoder__vision__architecture__layers": 2, **VQA}
    else:
        changes |= {"task__objectives__mlm__norm_eps": 1e-12}
    made = bundle(labels, **changes)
    if form == "official":
        made.nodes["task"]["objectives"] |= ITC["task__objectives"]
        made.state |= {key: tensor for key, tensor in bundle(**ITC).state.items() if key.startswith("objectives.itc.")}
        made.state["objectives.itc.temperature"] = torch.tensor(0.0712345)
    write_folder(made, tmp_path / "folder")
    read = read_folder(tmp_path / "folder")
    if form == "official":
        rows = export_released(read, tmp_path / "out.ckpt")
        back, _ = import_source(open_source(tmp_path / "out.ckpt"))
    else:
        rows = export_transformers(read, tmp_path / "out")
        back, _ = import_source(open_source(tmp_path / "out"))
    equal(back.state, made.state)
    assert back.labels == made.labels
    own, again = build(made).tower, build(back).tower
    assert again.vision.image_size == 40
    assert again.cross.text_layers[1].ffn.norm.eps == own.cross.text_layers[1].ffn.norm.eps == 3e-6
    assert again.text.model.config.num_attention_heads == 2
    assert back.nodes["data"]["max_text_len"] == 17
    differs = [row.part for row in rows if row.what == "differs"]
    assert "cross.norm_eps" in differs
    if form == "hf":
        assert build(back).objectives["mlm"].head.norm.eps == 1e-12
        # Someone else's change of the folder counts.
        config = json.loads((tmp_path / "out/config.json").read_text())
        config["text_config"]["layer_norm_eps"] = 4e-6
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        changed, _ = import_source(open_source(tmp_path / "out"))
        assert changed.nodes["cross"]["norm_eps"] == 4e-6


MANAGERS = {"bridge": {"_target_": "bt.models.bridges.manager.ManagerBridge", "managed": 2, "attend_padding": True}}
REFUSALS = {
    "managers": ("hf", MANAGERS, "the bridge ManagerBridge: transformers has add, scaled_add, interpolate"),
    "token types": ("hf", NLVR2, r"3 token types \(NLVR2\): transformers has 2.*the head nlvr2"),
    "heads": ("hf", {"cross__heads": 4}, "cross.heads=4: transformers builds.*text encoder's, 2 heads"),
    "ffn": ("hf", {"cross__ffn_ratio": 4}, "a FFN of 256: transformers builds.*FFN 128"),
    "head": ("hf", VQA, "the head vqa: the format has no place for it; leave it out by --leave-out vqa"),
    "itc": ("hf", ITC, "the head itc: transformers' contrastive image head reads the projected image"),
    "gelu": ("hf", {"encoder__vision__architecture__quick_gelu": False}, "has GELU, the target QuickGELU"),
    "contrast": ("official", CONTRASTIVE, "no contrastive head on the fused pair"),
    "bridge": ("official", {"bridge___target_": "bt.models.bridges.learned.GateBridge"}, "the bridge GateBridge"),
    "sides": ("official", {"bridge__sides": "text"}, "bridge.sides=text"),
    "layers": ("official", {"bridge__uni_layers": "last"}, "bridge.uni_layers=last"),
    "pre-norm": ("official", {"cross__norm": "pre"}, "norms before the sub-layers"),
    "ratio": ("official", {"cross__ffn_ratio": 1.5}, "cross.ffn_ratio=1.5: the released code takes whole numbers"),
    "merged": ("official", {"cross___target_": "bt.models.cross_variants.MergedAttention"}, "no co-attention"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(case, tmp_path):
    form, changes, said = REFUSALS[case]
    made = bundle({"answers": ["a", "b"]} if changes is VQA else {"classes": ["False", "True"]}, **changes)
    with pytest.raises(CheckpointError, match=f"cannot hold this model: .*{said}"):
        export_transformers(made, tmp_path / "out") if form == "hf" else export_released(made, tmp_path / "out.ckpt")
    assert [*tmp_path.iterdir()] == []
    if case in ("token types", "head", "itc"):
        made.leave_out(made.objectives())
        export_transformers(made, tmp_path / "out")
        assert len(open_source(tmp_path / "out").tensors["bridgetower.token_type_embeddings.weight"]) == 2


def test_a_released_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/out: the released code's format is a file, .* in .ckpt"):
        export_released(bundle(), tmp_path / "out")
    (tmp_path / "file").touch()
    for place, said in ((tmp_path / "file/a.ckpt", "Not a directory|File exists"), (Path("/proc/a.ckpt"), "No such")):
        with pytest.raises(CheckpointError, match=f"^{place} cannot be written: ({said})"):
            export_released(bundle(), place)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as a full disk
    try:
        with pytest.raises(CheckpointError, match="a.ckpt cannot be written: File too large"):
            export_released(bundle(), tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("form", ["torch_export", "onnx"])
def test_graphs_of_the_three_calls(form, tmp_path):
    """Compared on other sizes than they were traced with, one image and one text among them; see export_graphs."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    made = bundle(**NLVR2, labels={"classes": ["False", "True"]})
    rows = export_graphs(made, tmp_path / "graphs", form)
    suffix = {"onnx": "onnx", "torch_export": "pt2"}[form]
    assert [row.part for row in rows] == [f"{name}.{suffix}" for name in ("encode_images", "encode_texts", "fuse")]
    described = json.loads((tmp_path / "graphs/tower.json").read_text())
    assert described["image_size"] == 24 and described["text_states"] == 2 and described["pad_id"] == 1
    # Not by its own comparison: another program's reading of the second image's type.
    tower, (images, _) = tower_of(made), inputs(24)
    types = torch.tensor([1, 2, 2])
    with torch.no_grad():
        wanted = torch.stack(tower.encode_images(images, types).states)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "graphs/encode_images.onnx")
        found = torch.from_numpy(session.run(["states"], {"images": images.numpy(), "types": types.numpy()})[0])
    else:
        found = torch.export.load(tmp_path / "graphs/encode_images.pt2").module()(images=images, types=types)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_graph_that_differs_is_refused(tmp_path, monkeypatch):
    """The comparison is no formality."""
    monkeypatch.setattr("bt.interop.graphs.calls", lambda tower: [])
    export_graphs(bundle(), tmp_path / "none", "torch_export")
    from bt.interop.graphs import Call, EncodeTexts, _compare

    tower = tower_of(bundle())
    ids = torch.randint(5, 30, (2, 6))
    given = {"ids": ids, "mask": torch.ones(2, 6, dtype=torch.bool)}
    call = Call("encode_texts", EncodeTexts(tower), given, [given], {})
    with torch.no_grad():
        states, cls = call.module(**given)
        assert _compare(call, given, (states, cls)) == 0
        with pytest.raises(CheckpointError, match="encode_texts: its cls differs from the model's by"):
            _compare(call, given, (states, cls + 1e-3 * cls.abs().max()))
