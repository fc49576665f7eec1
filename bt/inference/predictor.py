"""A trained model that answers questions about pictures, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from bt.data.batch import Texts
from bt.engine.precision import autocast
from bt.errors import DataError
from bt.inference.encoder import Encoder, NoHead
from bt.inference.inputs import (
    Picture,
    Pictures,
    Side,
    Strings,
    as_list,
    check_texts,
    chunks,
    is_one,
    pair_count,
)
from bt.models.attention import AttentionMaps
from bt.models.bridgetower import Encoded, Need
from bt.tasks.irtr import IRTR
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM
from bt.tasks.nlvr2 import NLVR2
from bt.tasks.snli_ve import SNLIVE
from bt.tasks.vqa import VQA

MatchKind = Literal["itm", "rank", "itc"]
MASKS = ("[MASK]", "<mask>")  # as a caller may write the tokenizer's mask token


@dataclass(frozen=True)
class Choice:
    """One of several answers, labels or words. probability: in 0...1.

    Answers to questions have one each for themselves (they were trained with binary cross-entropy), labels and words
    share 1 among them.
    """

    name: str
    probability: float


@dataclass(frozen=True)
class Attention:
    """Where a pair's cross-modal layers look. tokens: of the text, with its special ones.

    maps: one AttentionMaps a cross-modal layer, bottom first, of this one pair, on the CPU. grid: rows and columns of
    the picture's patches; maps have the image's class token in front of them.
    """

    tokens: list[str]
    maps: list[AttentionMaps]
    grid: int

    def heat(self) -> Tensor:
        """(tokens, grid, grid): how much each token looks at each patch, mean over layers and heads; a token's patches
        add up to 1, its look at the image's class token left out. Layers whose text does not look are left out."""
        looks = [maps.text_to_image for maps in self.maps if maps.text_to_image is not None]
        if not looks:
            raise NoHead("no cross-modal layer of this model has texts that look at images")
        heat = torch.stack([look[0].mean(0) for look in looks]).mean(0)[:, 1:]
        return (heat / heat.sum(1, keepdim=True).clamp_min(1e-12)).unflatten(1, (self.grid, self.grid))

    def seen(self) -> Tensor:
        """(tokens,): how much the picture's patches look at each token, mean over patches, layers and heads; adds up to
        1."""
        looks = [maps.image_to_text for maps in self.maps if maps.image_to_text is not None]
        if not looks:
            raise NoHead("no cross-modal layer of this model has images that look at texts")
        seen = torch.stack([look[0].mean(0) for look in looks]).mean(0)[1:].mean(0)
        return seen / seen.sum().clamp_min(1e-12)


class Predictor(Encoder):
    """A trained model in use. Made by `bt.load`.

    Pictures are paths, bytes of an image file, PIL images, or pixels of `preprocess`; they are prepared as in the run's
    evaluations. Texts are cut to `max_text_len` tokens. Methods take one picture and one text and return one result, or
    take lists and return a list: as many pictures as texts, or one of one kind for all of the other. In place of
    pictures, `encode_images` of them can be given, so that they are encoded once.

    Any number of threads may use it at once: nothing of the model changes, and the tokenizer's cache has a lock.

    abilities: which of answer, match, fill_mask, entails, compare its heads allow. answers: those it knows (VQA), or
    []. source: what was loaded. Methods raise NoHead without the head that they need, DataError for pictures that
    cannot be read, texts that are empty, and lists that do not go together.
    """

    # What the model can do

    @property
    def abilities(self) -> list[str]:
        heads = {"answer": VQA, "fill_mask": MLM, "entails": SNLIVE, "compare": NLVR2}
        found = [name for name, kind in heads.items() if self.find(kind)]
        return found + (["match"] if self.match_kinds else [])

    @property
    def match_kinds(self) -> list[MatchKind]:
        """How `match` can compare, best first."""
        found = {"itm": self.find(ITM), "rank": self.find(IRTR), "itc": self.contrast}
        return [kind for kind, head in found.items() if head is not None]

    @property
    def answers(self) -> list[str]:
        head = self.find(VQA)
        return list(head.answers) if head else []

    @property
    def mask_token(self) -> str:
        """The tokenizer's; fill_mask takes [MASK] and <mask> for it, too."""
        return self.tokenizer.special["mask"]

    # Questions

    @overload
    def answer(self, pictures: Picture, questions: str, top: int = 5) -> list[Choice]: ...
    @overload
    def answer(self, pictures: Pictures, questions: list[str], top: int = 5) -> list[list[Choice]]: ...

    def answer(self, pictures, questions, top=5):
        """The `top` likeliest answers to each question about its picture, best first."""
        head = self._head(VQA, "answers")
        scores = self.fused_scores(pictures, questions, lambda cls: head.head(cls).float().sigmoid())
        return _single(_choices(scores, head.answers, top), pictures, questions)

    @overload
    def match(self, pictures: Picture, texts: str, by: MatchKind | None = None) -> float: ...
    @overload
    def match(self, pictures: Pictures, texts: list[str], by: MatchKind | None = None) -> list[float]: ...

    def match(self, pictures, texts, by=None):
        """How well each picture and its text match.

        by: "itm", the probability of a match by the ITM head; "rank", the score of the 16-way rank head, which only
        orders; "itc", the cosine of uni-modal features in -1...1. None: the first of these that the model has.
        """
        kinds = self.match_kinds
        if by is None:
            by = self._found(kinds[0] if kinds else None, "matching")
        if by not in kinds:
            raise NoHead(f"match by {by!r}: {self.source} allows {', '.join(kinds) or 'none'}")
        if by == "itc":
            found = self._similarity(pictures, texts)
        elif by == "rank":
            found = self.fused_scores(pictures, texts, self._head(IRTR, "ranking").score)
        else:
            head = self._head(ITM, "matching")
            found = self.fused_scores(pictures, texts, lambda cls: head.head(cls).float().softmax(1)[:, 1])
        return _single(found.tolist(), pictures, texts)

    @overload
    def entails(self, pictures: Picture, hypotheses: str) -> list[Choice]: ...
    @overload
    def entails(self, pictures: Pictures, hypotheses: list[str]) -> list[list[Choice]]: ...

    def entails(self, pictures, hypotheses):
        """Whether each picture entails its hypothesis, contradicts it or neither (SNLI-VE): all labels, best first."""
        head = self._head(SNLIVE, "entailment")
        scores = self.fused_scores(pictures, hypotheses, lambda cls: head.head(cls).float().softmax(1))
        return _single(_choices(scores, head.classes, len(head.classes)), pictures, hypotheses)

    @overload
    def compare(self, left: Picture, right: Picture, statements: str) -> list[Choice]: ...
    @overload
    def compare(self, left: Pictures, right: Pictures, statements: list[str]) -> list[list[Choice]]: ...

    @torch.no_grad()
    def compare(self, left, right, statements):
        """Whether each statement is true of its two pictures (NLVR2): both labels, best first."""
        head = self._head(NLVR2, "statements on two pictures")
        pairs = pair_count(pictures=left, second_pictures=right, texts=statements)
        sides = [
            Side(left, pairs, self.batch, self.encode_images),
            Side(right, pairs, self.batch, lambda pictures: self.encode_images(pictures, type_id=2)),
            Side(statements, pairs, self.batch, self.encode_texts),
        ]
        found = []
        for rows in chunks(pairs, self.batch):
            (first, a), (second, b), (texts, c) = (side.at(rows) for side in sides)
            with autocast(self.device, self.precision):
                cls = [
                    self.tower.fuse(images, texts, torch.stack([own, c], 1), Need(cls=True)).cls
                    for images, own in ((first, a), (second, b))
                ]
                found.append(head.head(torch.cat(cls, dim=1)).float().softmax(1).cpu())
        return _single(_choices(_rows(found), head.classes, len(head.classes)), left, right, statements)

    @overload
    def fill_mask(self, pictures: Picture, texts: str, top: int = 5) -> list[list[Choice]]: ...
    @overload
    def fill_mask(self, pictures: Pictures, texts: list[str], top: int = 5) -> list[list[list[Choice]]]: ...

    @torch.no_grad()
    def fill_mask(self, pictures, texts, top=5):
        """For each [MASK] of each text, in their order, the `top` likeliest tokens given the picture, best first."""
        head = self._head(MLM, "masked words")
        _check_top(top)
        written = [self.with_masks(text) for text in check_texts(as_list(texts))]
        found = []
        for images, rows, tokens in self._tokens_of_pairs(pictures, written):
            positions = (tokens.ids == self.tokenizer.mask_id).to(self.device)
            pairs = torch.stack([rows, torch.arange(len(rows), device=self.device)], 1)
            encoded = self._encode_tokens(tokens)
            with autocast(self.device, self.precision):
                fused = self.tower.fuse(images, encoded, pairs, Need(text=positions))
                chances, ids = head.head(fused.text).float().softmax(1).topk(min(top, self.tokenizer.vocab_size))
            masks = iter(zip(chances.tolist(), ids.tolist(), strict=True))
            for number in positions.sum(1).tolist():
                found.append([self._words(*next(masks)) for _ in range(number)])
        return _single(found, pictures, texts)

    def _words(self, chances: list[float], ids: list[int]) -> list[Choice]:
        return [Choice(self.token(number), chance) for number, chance in zip(ids, chances, strict=True)]

    def token(self, number: int) -> str:
        """A token as it reads: without the marks of word pieces, special ones by their names."""
        if number in self.tokenizer.special_ids:
            return self.tokenizer.backend.id_to_token(number)
        return self.tokenizer.decode([number]).strip()

    def with_masks(self, text: str) -> str:
        """The text with the tokenizer's mask token for each of MASKS."""
        for mask in MASKS:
            text = text.replace(mask, self.mask_token)
        return text

    def _tokens_of_pairs(self, pictures: Pictures, texts: list[str]) -> Iterator[tuple[Encoded, Tensor, Texts]]:
        """(images, rows of them, tokens) of at most `batch` pairs; each text has a mask within the longest length."""
        pairs = pair_count(pictures=pictures, texts=texts)
        side = Side(pictures, pairs, self.batch, self.encode_images)
        for rows in chunks(pairs, self.batch):
            chosen = [texts[row] if len(texts) > 1 else texts[0] for row in rows.tolist()]
            tokens = self._tokens(chosen)
            lacking = (tokens.ids == self.tokenizer.mask_id).any(1).logical_not().nonzero()
            if len(lacking):
                text = chosen[int(lacking[0])]
                raise DataError(f"no [MASK] in the first {self.max_text_len} tokens of the text {text!r}")
            yield *side.at(rows), tokens

    # Attention

    @torch.no_grad()
    def attention(self, picture: Picture, text: str) -> Attention:
        """The cross-attention probabilities of one picture and one text, in every cross-modal layer and head."""
        tokens = self._tokens(check_texts([text]))
        images, texts = self.encode_images([picture]), self._encode_tokens(tokens)
        with autocast(self.device, self.precision):
            pairs = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            maps = self.tower.attention_maps(images, texts, pairs)
        names = [self.token(number) for number in tokens.ids[0].tolist()]
        return Attention(names, [layer.cpu() for layer in maps], self.tower.vision.grid)

    # Pairs

    @torch.no_grad()
    def fused_scores(self, pictures: Pictures, texts: Strings, head: Callable[[Tensor], Tensor]) -> Tensor:
        """(pairs, ...) float32 on the CPU: `head` of the fused [CLS] pairs."""
        pairs = pair_count(pictures=pictures, texts=texts)
        found = []
        images = Side(pictures, pairs, self.batch, self.encode_images)
        strings = Side(texts, pairs, self.batch, self.encode_texts)
        for rows in chunks(pairs, self.batch):
            (image, image_rows), (text, text_rows) = images.at(rows), strings.at(rows)
            with autocast(self.device, self.precision):
                fused = self.tower.fuse(image, text, torch.stack([image_rows, text_rows], 1), Need(cls=True))
                found.append(head(fused.cls).float().cpu())
        return _rows(found)

    @torch.no_grad()
    def _similarity(self, pictures: Pictures, texts: Strings) -> Tensor:
        pairs = pair_count(pictures=pictures, texts=texts)
        if not pairs:
            return torch.empty(0)
        images = self.image_features(pictures).expand(pairs, -1)
        return (images * self.text_features(texts).expand(pairs, -1)).sum(1).cpu()


def _rows(found: list[Tensor]) -> Tensor:
    return torch.cat(found) if found else torch.empty(0, 0)


def _check_top(top: int) -> None:
    if top < 1:
        raise DataError(f"top={top} is out of range: must be at least 1")


def _choices(scores: Tensor, names: list[str], top: int) -> list[list[Choice]]:
    _check_top(top)
    if not len(scores):
        return []
    chances, places = scores.topk(min(top, len(names)))
    rows = zip(chances.tolist(), places.tolist(), strict=True)
    return [[Choice(names[place], chance) for place, chance in zip(b, a, strict=True)] for a, b in rows]


def _single(results: list, *given: object):
    return results[0] if is_one(*given) else results
