"""Models as folders of transformers' BridgeTower classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bt.data.batch import Texts
from bt.engine.checkpoint import save_tensors
from bt.interop.architecture import LINK_TOWERS
from bt.interop.exports import Sizes, measure, need_heads, record_of, refuse, rows_of
from bt.interop.folder import Bundle, build, new_folder
from bt.interop.huggingface import to_huggingface, transformers_name
from bt.interop.imports import Row, token_roles
from bt.interop.record import RECORD
from bt.models.bridgetower import Need

LINK_TOWER_OF_BRIDGE = {target: name for name, target in LINK_TOWERS.items()}
HEADS = ("mlm", "itm", "contrastive")


def export_transformers(bundle: Bundle, out: Path) -> list[Row]:
    """A folder that transformers' BridgeTower classes load."""
    sizes = measure(bundle)
    if not sizes.refused:
        _check_transformers(sizes, bundle)
    refuse(sizes, "transformers")
    same = bundle.origin.get("format") == "transformers"
    bare = bool(same and bundle.origin.get("bare") and not bundle.objectives())
    state = to_huggingface(bundle.state, bare)
    kept = {key: tensor for key, tensor in bundle.unused.items() if same or key.startswith("text_transformer.pooler.")}
    heads = ("logit_scale", "mlm_score.")
    for key, tensor in kept.items():
        name = key if key.startswith(heads) else ("" if bare else "bridgetower.") + transformers_name(key)
        state[name] = tensor
    with new_folder(out) as folder:
        config = transformers_config(bundle, sizes)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_tensors(state, folder / "model.safetensors", {"format": "pt"})
        (folder / f"{RECORD}.json").write_text(json.dumps(record_of(bundle, sizes), indent=1) + "\n")
        said = write_processor(bundle, sizes, folder)
    return rows_of(bundle, kept, sizes, said)


def _check_transformers(sizes: Sizes, bundle: Bundle) -> None:
    tower, text, layer = sizes.model.tower, sizes.text, sizes.cross_layer
    wanted = ", ".join(LINK_TOWERS)
    bridge = sizes.bridge.rpartition(".")[2]
    sizes.need(sizes.bridge in LINK_TOWER_OF_BRIDGE, f"the bridge {bridge}: transformers has {wanted}")
    sizes.need(
        text.model_type == "roberta", f"its text encoder is of the kind {text.model_type}, transformers' RoBERTa"
    )
    same = tower.text.depth == tower.vision.depth
    sizes.need(same, f"encoders of {tower.text.depth} and {tower.vision.depth} layers: transformers' are equal")
    rows = len(tower.type_embeddings.weight)
    sizes.need(rows == 2, f"{rows} token types (NLVR2): transformers has 2")
    # Its cross-modal layers are built from the text configuration.
    text_of = "transformers builds the cross-modal layers like the text encoder's"
    sizes.need(tower.width == text.hidden_size, f"cross.width={tower.width}: {text_of}, {text.hidden_size} wide")
    heads, hidden = layer.self_attention.heads, layer.ffn.up.out_features
    sizes.need(heads == text.num_attention_heads, f"cross.heads={heads}: {text_of}, {text.num_attention_heads} heads")
    sizes.need(hidden == text.intermediate_size, f"a FFN of {hidden}: {text_of}, FFN {text.intermediate_size}")
    # What came from there goes back there.
    read = ("itc",) if bundle.origin.get("format") == "transformers" else ()
    need_heads(sizes, bundle, (*HEADS, *read))
    if sizes.refused:
        return
    sizes.say("cross.norm_eps", layer.ffn.norm.eps, text.layer_norm_eps)
    if "mlm" in sizes.model.objectives:
        eps = sizes.model.objectives["mlm"].head.norm.eps
        sizes.say("task.objectives.mlm.norm_eps", eps, tower.text_bridge.norms[0].eps)
    sizes.say("cross.dropout", layer.ffn.dropout.p, text.hidden_dropout_prob)
    data = bundle.nodes.get("data", {})
    longest = min(50, tower.text.max_positions)
    sizes.say("data.max_text_len", data.get("max_text_len", longest), longest)
    sizes.say("data.eval_transform", data.get("eval_transform", "clip"), "clip")


# The head that a folder has most use for names its class, for AutoModel.
CLASSES = {
    "contrastive": "BridgeTowerForContrastiveLearning",
    "mlm": "BridgeTowerForMaskedLM",
    "itm": "BridgeTowerForImageAndTextRetrieval",
}


def transformers_config(bundle: Bundle, sizes: Sizes) -> dict[str, Any]:
    """config.json: what was read, if it was transformers' own, else what says the model."""
    from transformers import BridgeTowerConfig

    if bundle.origin.get("format") == "transformers":
        return bundle.origin["settings"]
    tower, text, vision = sizes.model.tower, sizes.text, sizes.model.tower.vision
    objectives = sizes.model.objectives
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings type_vocab_size layer_norm_eps pad_token_id"
    )
    tokenizer = bundle.tokenizer
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    extra = {}
    if "contrastive" in objectives:
        extra = {
            "contrastive_hidden_size": objectives["contrastive"].text_head.fc.out_features,
            "logit_scale_init_value": bundle.state["objectives.contrastive.logit_scale"].item(),
        }
    config = BridgeTowerConfig(
        hidden_size=tower.width,
        num_attention_heads=sizes.cross_layer.self_attention.heads,
        num_hidden_layers=tower.cross.layers,
        layer_norm_eps=tower.text_bridge.norms[0].eps,
        link_tower_type=LINK_TOWER_OF_BRIDGE[sizes.bridge],
        text_config={name: getattr(text, name) for name in names.split()} | ends,
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "patch_size": vision.visual.conv1.kernel_size[0],
            "image_size": vision.image_size,
        },
        architectures=[next((CLASSES[name] for name in CLASSES if name in objectives), "BridgeTowerModel")],
        **extra,
    )
    return json.loads(config.to_json_string(use_diff=False))


def write_processor(bundle: Bundle, sizes: Sizes, folder: Path) -> dict[str, str]:
    """The files that BridgeTowerProcessor loads, as far as they can be had; returns what is to be said of them."""
    from transformers import BridgeTowerImageProcessor, BridgeTowerProcessor, PreTrainedTokenizerFast

    size, said = sizes.model.tower.vision.image_size, {}
    # Their sides are rounded to multiples of size_divisor, 32 in the released folders.
    divisor = 32 if size % 32 == 0 else sizes.model.tower.vision.visual.conv1.kernel_size[0]
    images = BridgeTowerImageProcessor(
        size={"shortest_edge": size}, crop_size={"shortest_edge": size}, size_divisor=divisor
    )
    if (name := bundle.nodes.get("data", {}).get("eval_transform", "clip")) not in ("clip",):
        said["image processor"] = f"the model saw images of the transform {name}, transformers has only that of clip"
    if bundle.tokenizer is None:
        images.save_pretrained(folder)
        node = bundle.nodes["encoder"]["text"]["tokenizer"]
        said["processor"] = (
            f"no tokenizer at hand ({node.get('name') or 'none is named'}): only the image processor is written; "
            "--tokenizer FOLDER adds it"
        )
        return said
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bundle.tokenizer.backend,
        model_max_length=sizes.model.tower.text.max_positions,
        **token_roles(bundle.tokenizer),
    )
    BridgeTowerProcessor(images, tokenizer).save_pretrained(folder)
    return said


@torch.no_grad()
def compare_transformers(bundle: Bundle, folder: Path) -> list[Row]:
    """Loads a written folder with transformers, and says how far its outputs are from those of the model here."""
    from transformers import BridgeTowerModel

    ours = build(bundle)
    ours.load_state_dict(bundle.state)
    tower = ours.eval().tower
    theirs = BridgeTowerModel.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    size, rows, pad = tower.vision.image_size, tower.text.vocab_size, tower.text.pad_id
    images = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(5, rows, (2, min(12, tower.text.max_positions)), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, ids.shape[1] // 2 :] = False
    ids = ids.masked_fill(~mask, pad)
    given = theirs(input_ids=ids, attention_mask=mask.long(), pixel_values=images)
    pairs = torch.arange(2)[:, None].expand(-1, 2)
    fused = tower.fuse(tower.encode_images(images), tower.encode_texts(Texts(ids, mask)), pairs, Need(True, True, True))
    found = {"pooler_output": fused.cls, "text_features": fused.text, "image_features": fused.image}
    return [
        Row("compared", name, 0, 0, f"largest difference {(getattr(given, name) - own).abs().max().item():.2e}")
        for name, own in found.items()
    ]
