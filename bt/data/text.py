"""Tokenizers: a pre-trained one of transformers, or a word-level one made from the training texts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from bt.data.batch import Texts
from bt.errors import ConfigError, DataError

# Loader workers are forked and are themselves the parallelism; the library's threads would not survive the fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the ids 0-4; the first four as in RoBERTa
_CACHED_TEXTS = 65_536


class Tokenizer:
    """Texts to ids.

    bos_id, eos_id, pad_id, special_ids (all of them), vocab_size; mask_id, None where there is no mask token (CLIP),
    and then no MLM. Encodings of the texts seen last are kept, since questions and captions repeat.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]):
        """special: the tokens that play the roles bos, eos, pad and, where there is one, mask."""
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        ids = {role: backend.token_to_id(token) for role, token in special.items()}
        missing = [f"{role} ('{special[role]}')" for role, number in ids.items() if number is None]
        if missing:
            raise DataError(f"the tokenizer has no {', '.join(missing)} token")
        self.special = special
        self.bos_id, self.eos_id, self.pad_id = (ids[role] for role in ("bos", "eos", "pad"))
        self.mask_id = ids.get("mask")
        added = [number for number, token in backend.get_added_tokens_decoder().items() if token.special]
        self.special_ids = sorted({*ids.values(), *added})
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._cache: dict[str | tuple[str, str], list[int]] = {}

    def encode(self, texts: Sequence[str | tuple[str, str]], max_length: int) -> list[list[int]]:
        """Ids of each text with start and end token; of longer texts the first max_length - 2 tokens between them.

        A text may be two segments, which the tokenizer joins in its own way; together they are cut like one.
        """
        fresh = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if len(self._cache) + len(fresh) > _CACHED_TEXTS:
            self._cache.clear()
            fresh = list(dict.fromkeys(texts))
        self._cache.update(zip(fresh, (item.ids for item in self.backend.encode_batch(fresh)), strict=True))
        rows = (self._cache[text] for text in texts)
        return [ids if len(ids) <= max_length else [*ids[: max_length - 1], self.eos_id] for ids in rows]

    def batch(self, texts: Sequence[str | tuple[str, str]], max_length: int, multiple: int = 1) -> Texts:
        """Texts padded to the longest of them, or to the next multiple of so many tokens, as far as max_length goes."""
        rows = self.encode(texts, max_length)
        longest = max(map(len, rows), default=0)
        tokens = min(-(-longest // multiple) * multiple, max_length)
        ids = np.full((len(rows), tokens), self.pad_id, np.int64)
        mask = np.zeros(ids.shape, bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = True
        return Texts(torch.from_numpy(ids), torch.from_numpy(mask))

    def word_starts(self, texts: Sequence[str | tuple[str, str]], max_length: int, multiple: int = 1) -> Tensor:
        """(texts, tokens) int64 beside `batch`: the column in which the word of a token begins.

        Words are what the tokenizer cuts a text into before it cuts words into pieces; RoBERTa's are letters, digits
        or signs in a row, with the space before them ("don't" is "don" and "'t"). A special token and padding begin
        themselves.
        """
        rows = self.backend.encode_batch(list(texts))
        longest = min(max(map(len, rows), default=0), max_length)
        starts = np.tile(np.arange(min(-(-longest // multiple) * multiple, max_length)), (len(rows), 1))
        for row, item in zip(starts, rows, strict=True):
            words = list(zip(item.sequence_ids, item.word_ids, strict=True))
            # The last token of a text that is cut is its end token instead.
            last = len(row) - 1 if len(words) > max_length else len(words)
            for column in range(1, last):
                if words[column][1] is not None and words[column] == words[column - 1]:
                    row[column] = row[column - 1]
        return torch.from_numpy(starts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids if int(i) not in self.special_ids])

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json, which `load_tokenizer` reads."""
        self.backend.save(str(path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


def _roles(backend: tokenizers.Tokenizer, where: str) -> dict[str, str]:
    """Which tokens are start, end, padding and mask: RoBERTa's, BERT's or CLIP's names. CLIP has no mask token,
    and pads with its end token."""
    clip = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>"
    for names in (("<s>", "</s>", "<pad>", "<mask>"), ("[CLS]", "[SEP]", "[PAD]", "[MASK]"), clip):
        if all(backend.token_to_id(name) is not None for name in names):
            return dict(zip(("bos", "eos", "pad", "mask"), names, strict=False))
    raise DataError(f"{where}: neither RoBERTa's nor BERT's nor CLIP's special tokens are in this tokenizer")


def train_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """A word-level tokenizer of these texts: lower case, split at white space and punctuation.

    The vocabulary is in the order of frequency, then of the alphabet, so the same texts give the same ids in any order.
    vocab_size: most ids, the five special ones included; None keeps every word.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    words: Counter[str] = Counter()
    for text, times in Counter(texts).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += times
    for token in SPECIAL:
        words.pop(token, None)
    ranked = sorted(words, key=lambda word: (-words[word], word))
    if vocab_size is not None:
        if vocab_size <= len(SPECIAL):
            raise ConfigError(f"vocab_size={vocab_size}: must be more than the {len(SPECIAL)} special tokens")
        ranked = ranked[: vocab_size - len(SPECIAL)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *ranked])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)]
    )
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, _roles(backend, "trained tokenizer"))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """A tokenizer saved with `Tokenizer.save`."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"cannot read the tokenizer {path}: {error}") from None
    return Tokenizer(backend, _roles(backend, str(path)))


def make_tokenizer(
    kind: str, texts: Iterable[str], *, name: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """What encoder.text.tokenizer asks for.

    kind: "pretrained", the one called `name`; or "trained", on `texts`, with at most `vocab_size` entries.
    """
    if kind == "trained":
        return train_tokenizer(texts, vocab_size)
    if kind != "pretrained":
        raise ConfigError(f"encoder.text.tokenizer.kind={kind}: allowed are pretrained, trained")
    if not name:
        raise ConfigError("encoder.text.tokenizer.name must name a tokenizer of transformers or a local folder")
    return pretrained_tokenizer(name)


def pretrained_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a transformers model, by name or local folder."""
    from transformers import AutoTokenizer  # slow to import, and not needed for trained tokenizers

    try:
        # Without the last a folder could name code of its own, for which transformers asks at the terminal.
        found = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError and the hub's own errors
        first = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(
            f"cannot load the tokenizer '{name}': {first} (give a local folder that holds its tokenizer.json)"
        ) from None
    if not getattr(found, "is_fast", False):
        raise ConfigError(f"the tokenizer '{name}' has no tokenizer.json; only such can be used")
    roles = {
        "bos": found.cls_token or found.bos_token,
        "eos": found.sep_token or found.eos_token,
        "pad": found.pad_token,
        "mask": found.mask_token,
    }
    if roles["mask"] is None:
        del roles["mask"]
    if None in roles.values():
        raise ConfigError(f"the tokenizer '{name}' lacks a {[k for k, v in roles.items() if v is None][0]} token")
    return Tokenizer(found.backend_tokenizer, roles)
