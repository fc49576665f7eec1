"""Masked language modelling on image-text pairs (BridgeTower paper, section 3.3; official compute_mlm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.batch import Texts
from bt.data.draft import Draft
from bt.errors import ConfigError
from bt.models.bridgetower import Need
from bt.models.checks import check_range
from bt.models.heads import MLMHead
from bt.tasks.base import Context, Objective, Result, Shared


@dataclass
class MLMTargets:
    """Masks tokens: of the chosen ones 80 % become the mask token, 10 % a random id of the whole vocabulary, 10 % stay.

    Special tokens and padding are never chosen. masking says how the others are:
    "token": each for itself with `probability` (transformers' DataCollatorForLanguageModeling; BridgeTower);
    "whole_word": each word with `probability`, all of its tokens together (Draft.word_starts says what a word is);
    "meter": what METER's whole-word collator does to RoBERTa's pieces, of which none begins with "##", so that it joins
    none: max(1, round(probability x max_text_len)) positions of a text padded to max_text_len, special tokens and
    padding among them, which are dropped then. At 50 positions 8 are drawn, 16 % of the tokens.

    Returns ids, mask (pairs, tokens), positions (pairs, tokens) bool and labels (chosen tokens,) in row-major order.
    """

    probability: float
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    masking: str = "token"

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        text_rows = draft.pairs[:, 1]
        ids, mask = draft.texts.ids[text_rows], draft.texts.mask[text_rows]
        tokens = ids.shape[1]

        def draw(purpose: str, columns: int = tokens) -> Tensor:
            return torch.from_numpy(draft.uniform(f"mlm.{purpose}", columns))

        if self.masking == "meter":
            length = draft.max_text_len
            drawn = draw("choose", length).argsort(dim=1)[:, : max(1, round(self.probability * length))]
            chosen = torch.zeros(len(ids), length, dtype=torch.bool).scatter_(1, drawn, True)[:, :tokens]
        else:
            choose = draw("choose")
            if self.masking == "whole_word":
                choose = choose.gather(1, draft.word_starts()[text_rows])
            chosen = choose < self.probability
        positions = chosen & mask & ~torch.isin(ids, torch.tensor(self.special_ids))
        labels = ids[positions]
        kind = draw("kind")
        random_ids = (draw("id") * self.vocab_size).long()
        ids = ids.masked_fill(positions & (kind < 0.8), self.mask_id)
        ids = torch.where(positions & (kind >= 0.9), random_ids, ids)
        return {"ids": ids, "mask": mask, "positions": positions, "labels": labels}


class MLM(Objective):
    """Cross-entropy over the masked positions; only these rows go through the head.

    probability, masking: see MLMTargets. norm_eps: of the head's norm, 1e-12 in the official code, 1e-5 in
    transformers' port.
    Gradients do not reach the poolers nor the last image cross-modal layer, as in the official code.
    """

    reads_texts = False

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        probability: float = 0.15,
        norm_eps: float = 1e-12,
        masking: Literal["token", "whole_word", "meter"] = "token",
    ):
        if masking not in ("token", "whole_word", "meter"):
            raise ConfigError(f"MLM.masking={masking}: allowed are token, whole_word, meter")
        check_range("MLM.probability", probability, above=0, at_most=1)
        check_range("MLM.norm_eps", norm_eps, above=0)
        tokenizer = context.tokenizer
        if tokenizer.mask_id is None:
            raise ConfigError("the tokenizer of encoder.text has no mask token, which MLM needs")
        targets = MLMTargets(
            probability, tokenizer.vocab_size, tokenizer.mask_id, tuple(tokenizer.special_ids), masking
        )
        super().__init__(weight, targets)
        self.head = MLMHead(context.width, tokenizer.vocab_size, norm_eps)

    def count(self, targets: dict[str, Tensor]) -> float:
        return targets["labels"].numel()

    def own_texts(self, targets: dict[str, Tensor]) -> Texts:
        return Texts(targets["ids"], targets["mask"])

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        texts = shared.own_texts(self)
        image_rows = shared.batch.pairs[:, 0]
        pairs = torch.stack([image_rows, torch.arange(len(image_rows), device=image_rows.device)], dim=1)
        fused = shared.tower.fuse(shared.images, texts, pairs, Need(text=targets["positions"]))
        logits = self.head(fused.text).float()
        loss = F.cross_entropy(logits, targets["labels"], reduction="sum")
        return Result(loss, {"accuracy": (logits.argmax(-1) == targets["labels"]).float()}, {"logits": logits})
