"""State dicts of the released BridgeTower and METER code, to and from a TaskModel's (`tower.*`, `objectives.*`).

Tensors are renamed; beside that
- the released cross-modal layers have separate query, key and value maps. Here self-attention has one map `qkv` and
  cross-attention one map `kv`: the rows of the parts, one below the other, in this order;
- the norm before the first cross-modal layer and the link towers' norms are the norms of one bridge: norm 0 is the
  former, norm l is link tower l - 1;
- some released tensors are never used (`unused`). They are dropped, and can be put back for a strict load with
  `to_official(state) | unused(released_state)`.
METER has neither bridge norms nor, in its image encoder, the last block; its other keys are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bt.errors import CheckpointError

# What a placeholder of the tables below stands for.
PLACEHOLDERS = {
    "m": "text|image",
    "l": r"\d+",
    "p": "weight|bias",
    "vit": r"class_embedding|positional_embedding|conv1\.weight|ln_pre\.\w+|ln_post\.\w+|transformer\.resblocks\..+",
    "bert": r"embeddings\..+|encoder\.layer\..+",
    "head": "vqa|nlvr2",
    "i": r"\d",
}

# Released name, own name.
RENAMED = (
    # The inner names are open_clip's and transformers' own and equal the released ones.
    ("vit_model.visual.{vit}", "tower.vision.visual.{vit}"),
    ("text_transformer.{bert}", "tower.text.model.{bert}"),
    ("token_type_embeddings.weight", "tower.type_embeddings.weight"),
    ("cross_modal_{m}_transform.{p}", "tower.{m}_projection.{p}"),
    ("cross_modal_{m}_pooler.dense.{p}", "tower.{m}_pooler.dense.{p}"),
    ("{m}_gate.{p}", "tower.{m}_bridge.gate.{p}"),  # METER with the fusion of all layers
    ("cross_modal_{m}_layers.{l}.attention.output.dense.{p}", "tower.cross.{m}_layers.{l}.self_attention.out.{p}"),
    ("cross_modal_{m}_layers.{l}.attention.output.LayerNorm.{p}", "tower.cross.{m}_layers.{l}.self_attention.norm.{p}"),
    ("cross_modal_{m}_layers.{l}.crossattention.self.query.{p}", "tower.cross.{m}_layers.{l}.cross_attention.q.{p}"),
    (
        "cross_modal_{m}_layers.{l}.crossattention.output.dense.{p}",
        "tower.cross.{m}_layers.{l}.cross_attention.out.{p}",
    ),
    (
        "cross_modal_{m}_layers.{l}.crossattention.output.LayerNorm.{p}",
        "tower.cross.{m}_layers.{l}.cross_attention.norm.{p}",
    ),
    ("cross_modal_{m}_layers.{l}.intermediate.dense.{p}", "tower.cross.{m}_layers.{l}.ffn.up.{p}"),
    ("cross_modal_{m}_layers.{l}.output.dense.{p}", "tower.cross.{m}_layers.{l}.ffn.down.{p}"),
    ("cross_modal_{m}_layers.{l}.output.LayerNorm.{p}", "tower.cross.{m}_layers.{l}.ffn.norm.{p}"),
    ("mlm_score.transform.dense.{p}", "objectives.mlm.head.dense.{p}"),
    ("mlm_score.transform.LayerNorm.{p}", "objectives.mlm.head.norm.{p}"),
    ("mlm_score.decoder.weight", "objectives.mlm.head.decoder.weight"),
    ("mlm_score.bias", "objectives.mlm.head.decoder.bias"),
    ("itm_score.fc.{p}", "objectives.itm.head.fc.{p}"),
    ("itc_{m}_head.fc.{p}", "objectives.itc.{m}_head.fc.{p}"),
    ("temperature", "objectives.itc.temperature"),
    ("{head}_classifier.{i}.{p}", "objectives.{head}.head.{i}.{p}"),
    ("snli_classifier.{i}.{p}", "objectives.snli_ve.head.{i}.{p}"),
    ("rank_output.{p}", "objectives.irtr.head.{p}"),
)

# Released names of the parts, own name of the whole: rows of the parts, one below the other.
FUSED = (
    (
        tuple(f"cross_modal_{{m}}_layers.{{l}}.attention.self.{part}.{{p}}" for part in ("query", "key", "value")),
        "tower.cross.{m}_layers.{l}.self_attention.qkv.{p}",
    ),
    (
        tuple(f"cross_modal_{{m}}_layers.{{l}}.crossattention.self.{part}.{{p}}" for part in ("key", "value")),
        "tower.cross.{m}_layers.{l}.cross_attention.kv.{p}",
    ),
)

# Registered by the released model but never used in its fused pass: released name, why.
UNUSED = {
    r"text_transformer\.pooler\..+": "pooler of the text encoder: registered, never called",
    r"text_transformer\.embeddings\.(position_ids|token_type_ids)": "a constant",
    r"vit_model\.visual\.embeddings\.position_ids": "a constant",
    r"vit_model\.positional_embedding": "position table of CLIP's text tower, which is not there",
    r"vit_model\.ln_final\..+": "norm of CLIP's text tower, which is not there",
    r"mlm_score\.decoder\.bias": "mlm_score.bias once more, to which transformers ties it",
    r"vit_model\.visual\.(cross_modal_)?ln_separate\..+": "norms per layer, which the fused pass never reads",
}


def why_unused(key: str) -> str | None:
    """Why the model never uses a released tensor; None where it does."""
    return next((reason for pattern, reason in UNUSED.items() if re.fullmatch(pattern, key)), None)


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression with one named group per placeholder of `template`."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>{PLACEHOLDERS[part]})" for i, part in enumerate(parts))
    )


RELEASED_PATTERNS = [(_pattern(released), own) for released, own in RENAMED]
OWN_PATTERNS = [(_pattern(own), released) for released, own in RENAMED]
PART_PATTERNS = [(_pattern(part), own, i) for parts, own in FUSED for i, part in enumerate(parts)]
WHOLE_PATTERNS = [(_pattern(own), parts) for parts, own in FUSED]
LINK_TOWER = _pattern("cross_modal_{m}_link_tower.{l}.LayerNorm.{p}")
FIRST_NORM = _pattern("cross_modal_{m}_layernorm.{p}")
BRIDGE_NORM = _pattern("tower.{m}_bridge.norms.{l}.{p}")


def _rename(key: str, patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in patterns:
        if match := pattern.fullmatch(key):
            return template.format(**match.groupdict())
    return None


def _own_name(key: str) -> str | None:
    """The own name of a released tensor that is not part of a fused one."""
    if match := LINK_TOWER.fullmatch(key):
        return f"tower.{match['m']}_bridge.norms.{int(match['l']) + 1}.{match['p']}"
    if match := FIRST_NORM.fullmatch(key):
        return f"tower.{match['m']}_bridge.norms.0.{match['p']}"
    return _rename(key, RELEASED_PATTERNS)


def _released_name(key: str) -> str | None:
    """The released name of an own tensor that is not fused."""
    if match := BRIDGE_NORM.fullmatch(key):
        if match["l"] == "0":
            return f"cross_modal_{match['m']}_layernorm.{match['p']}"
        return f"cross_modal_{match['m']}_link_tower.{int(match['l']) - 1}.LayerNorm.{match['p']}"
    return _rename(key, OWN_PATTERNS)


def unused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a released state dict that the model never uses."""
    return {key: tensor for key, tensor in state.items() if why_unused(key)}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict -> the same tensors under own names. Raises CheckpointError for keys it does not know
    and for fused maps of which a part is missing."""
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        if why_unused(key):
            continue
        for pattern, own, position in PART_PATTERNS:
            if match := pattern.fullmatch(key):
                parts.setdefault(own.format(**match.groupdict()), {})[position] = tensor
                break
        else:
            name = _own_name(key)
            if name is None:
                unknown.append(key)
            else:
                result[name] = tensor
    _refuse(unknown, "released keys that have no counterpart here")
    wanted = {"qkv": 3, "kv": 2}
    incomplete = [name for name, found in parts.items() if len(found) != wanted[name.split(".")[-2]]]
    _refuse(incomplete, "query, key or value is missing of")
    return result | {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`; fused maps are split into views. Raises CheckpointError for tensors that the
    released models do not have (other encoders, bridges, heads)."""
    result: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        for pattern, templates in WHOLE_PATTERNS:
            if match := pattern.fullmatch(key):
                names = [template.format(**match.groupdict()) for template in templates]
                result.update(zip(names, tensor.chunk(len(names)), strict=True))
                break
        else:
            name = _released_name(key)
            if name is None:
                unknown.append(key)
            else:
                result[name] = tensor
    _refuse(unknown, "tensors that the released models do not have")
    return result


def _refuse(keys: list[str], what: str) -> None:
    if keys:
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise CheckpointError(f"{what}: {', '.join(sorted(keys)[:5])}{more}")
