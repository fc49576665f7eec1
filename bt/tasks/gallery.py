"""All images and texts of a split, encoded once, spread over the ranks and ready to be fused in any pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from bt.data.batch import Batch, Texts
from bt.engine.distributed import World, broadcast, gather_objects
from bt.engine.precision import autocast
from bt.engine.progress import Countdown
from bt.engine.spill import TensorStore
from bt.errors import UserError
from bt.models.bridgetower import BridgeTower, Encoded, Need
from bt.tasks.base import Measuring, Objective


class NonFiniteScore(UserError):
    """A model whose scores are NaN or infinite ranks nothing."""


@dataclass
class Part:
    """What every rank learns of one batch.

    image_ids: (images,) of its image rows; states: (layers, tokens, width) of an image's states, None where none are
    kept. owners: (captions,) image id of each caption; keys: the captions' token ids as bytes. own: (captions,) score
    of each caption with its image. images, texts: features for the first comparison, (images, size), (captions, size).
    """

    image_ids: np.ndarray
    owners: np.ndarray
    keys: list[bytes]
    states: tuple[int, ...] | None = None
    own: np.ndarray | None = None
    images: np.ndarray | None = None
    texts: np.ndarray | None = None


@dataclass(frozen=True)
class Chunk:
    """Images first, first + 1, ... of the split: the `rows` of batch number `batch` of rank `rank`."""

    first: int
    rows: np.ndarray
    rank: int
    batch: int
    states: tuple[int, ...] | None

    @property
    def images(self) -> slice:
        return slice(self.first, self.first + len(self.rows))


class Gallery:
    """Images in the split's order, on every rank; captions likewise, each once. Different texts are divided among the
    ranks as the batches were: each rank numbers its own (`slots`, by length), and keeps their states.

    ranker: scores fused pairs (its `score`), or None: nothing is fused and no state kept. contrast: compares uni-modal
    features (its `image_features` and `text_features`), or None. pairs: in one forward pass. half: keep states in fp16.

    images, captions: their numbers. caption_image: (captions,). caption_slot: (captions,), -1 of other ranks' texts.
    slot_captions: (slots,), a caption of each.
    own: (captions,) float32, score of each caption with its image. image_features, text_features: (images, size),
    (captions, size), or None. chunks: which images come together.
    """

    def __init__(
        self,
        tower: BridgeTower,
        batches: Sequence[Batch],
        world: World,
        how: Measuring,
        *,
        ranker: Objective | None,
        contrast: Objective | None,
        pairs: int,
        half: bool,
    ):
        self.tower, self.batches, self.world, self.how = tower, batches, world, how
        self.ranker, self.contrast, self.pairs = ranker, contrast, pairs
        dtype = torch.float16 if half else torch.float32
        # Texts are read for every image, images once.
        self.text_states = TensorStore(how.cache_bytes // 2, how.work_dir, dtype)
        self.image_states = TensorStore(how.cache_bytes - how.cache_bytes // 2, how.work_dir, dtype)
        self.dtype = dtype
        self._text_numbers: dict[bytes, int] = {}
        self._again: Iterator[Batch] | None = None
        self._at = 0
        self._join(gather_objects(self._encode_all()))

    def close(self) -> None:
        self.text_states.close()
        self.image_states.close()

    # Encoding

    def _encode_all(self) -> list[Part]:
        progress = Countdown("encoding", len(self.batches), "batch", shown=self.world.main)
        parts = []
        for batch in self.batches:
            with autocast(self.world.device, self.how.precision):
                parts.append(self._encode(batch))
            progress.add(1)
        progress.close()
        return parts

    def _encode(self, batch: Batch) -> Part:
        """One batch: only what its pairs name, no false image or text that an objective had drawn."""
        images = self._encode_images(batch)
        used, rows = image_rows(batch)
        texts, keys, text_rows = self._encode_texts(batch)
        ids = batch.image_ids[used].numpy()
        part = Part(ids, ids[rows.numpy()], [keys[row] for row in text_rows.tolist()])
        if self.ranker is not None:
            image_states, text_states = self._kept(images), self._kept(texts)
            part.states = tuple(image_states.shape[1:])
            self.image_states.add(image_states)
            for key, states in zip(keys, text_states, strict=True):
                if key not in self._text_numbers:
                    self._text_numbers[key] = self.text_states.add(states[:, : _tokens(key)])
            part.own = self._own_scores(image_states, text_states, texts.mask, torch.stack([rows, text_rows], dim=1))
        if self.contrast is not None:
            part.images = self.contrast.image_features(images).float().cpu().numpy()
            part.texts = self.contrast.text_features(texts).float().cpu().numpy()[text_rows.numpy()]
        return part

    def _own_scores(self, images: Tensor, texts: Tensor, mask: Tensor, pairs: Tensor) -> np.ndarray:
        """From the states as they are kept, rounded if they are, as all other pairs are scored."""
        device = self.world.device
        of_images, of_texts = _restored(images.to(device), None), _restored(texts.to(device), mask)
        return torch.cat([self._fuse(of_images, of_texts, some) for some in pairs.to(device).split(self.pairs)]).numpy()

    def _encode_images(self, batch: Batch) -> Encoded:
        pixels = batch.images[image_rows(batch)[0]].to(self.world.device)
        return self.tower.encode_images(self.tower.vision.normalize(pixels))

    def _encode_texts(self, batch: Batch) -> tuple[Encoded, list[bytes], Tensor]:
        """Texts, their keys, and (captions,) the text row of each pair."""
        used, rows = batch.pairs[:, 1].unique(return_inverse=True)
        keys = [
            ids[mask].numpy().astype(np.int32).tobytes()
            for ids, mask in zip(batch.texts.ids[used], batch.texts.mask[used], strict=True)
        ]
        return self._encode_keys(keys), keys, rows

    def _encode_keys(self, keys: list[bytes]) -> Encoded:
        tokens = [torch.from_numpy(np.frombuffer(key, np.int32).astype(np.int64)) for key in keys]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, True, self.tower.text.pad_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(token) for token in tokens])[:, None]
        return self.tower.encode_texts(Texts(ids.to(self.world.device), mask.to(self.world.device)))

    def _kept(self, encoded: Encoded) -> Tensor:
        """(rows, layers, tokens, width) as they are kept."""
        return torch.stack(encoded.states, dim=1).to("cpu", self.dtype)

    # What all ranks know

    def _join(self, parts: list[list[Part]]) -> None:
        """Images and captions in the split's order: rank r had the batches r, r + ranks, ..."""
        self.chunks: list[Chunk] = []
        places: dict[int, int] = {}  # image id -> image
        owner_of: dict[bytes, int] = {}  # text -> the rank that keeps it
        order: list[Part] = []
        features: list[np.ndarray] = []
        for batch, turn in enumerate(zip_longest(*parts)):
            for rank, part in enumerate(turn):
                if part is None:
                    continue
                order.append(part)
                # The captions of an image can be in two batches; the first one has the image.
                new = np.array([row for row, image in enumerate(part.image_ids.tolist()) if image not in places], int)
                if len(new):
                    self.chunks.append(Chunk(len(places), new, rank, batch, part.states))
                    features += [] if part.images is None else [part.images[new]]
                for image in part.image_ids[new].tolist():
                    places[image] = len(places)
                for key in part.keys:
                    owner_of.setdefault(key, rank)
        keys = [key for part in order for key in part.keys]
        self.images, self.captions = len(places), len(keys)
        self._keys = sorted((key for key, rank in owner_of.items() if rank == self.world.rank), key=len)
        slots = {key: slot for slot, key in enumerate(self._keys)}
        self.slots = len(slots)
        self.caption_image = np.array([places[image] for part in order for image in part.owners.tolist()])
        self.caption_slot = np.array([slots.get(key, -1) for key in keys])
        self.slot_captions = torch.zeros(self.slots, dtype=torch.long)
        for caption, slot in enumerate(self.caption_slot.tolist()):
            if slot >= 0:
                self.slot_captions[slot] = caption
        self.own = None if self.ranker is None else self._finite(np.concatenate([part.own for part in order]))
        self.image_features = self.text_features = None
        if self.contrast is not None:
            self.image_features = torch.from_numpy(self._finite(np.concatenate(features)))
            self.text_features = torch.from_numpy(self._finite(np.concatenate([part.texts for part in order])))

    def own_pairs(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The captions of this rank's texts whose image is in the chunk; that image's row; the caption's slot."""
        here = (self.caption_slot >= 0) & (self.caption_image >= chunk.first) & (self.caption_image < chunk.images.stop)
        captions = np.flatnonzero(here)
        found = captions, self.caption_image[captions] - chunk.first, self.caption_slot[captions]
        return tuple(torch.from_numpy(numbers) for numbers in found)

    @staticmethod
    def _finite(values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise NonFiniteScore("retrieval: scores or features are not finite, so nothing can be ranked by them")
        return values

    def similarity(self, chunk: Chunk) -> Tensor:
        """(images of the chunk, slots) products of uni-modal features."""
        return self.image_features[chunk.images] @ self.text_features[self.slot_captions].T

    # Fusing

    def states_of(self, chunk: Chunk) -> Encoded:
        """The images of a chunk. Every rank asks for the same ones, in the order of `chunks`."""
        device = self.world.device
        if chunk.rank == self.world.rank:
            states = self.image_states.get(chunk.batch)
            states = self._encoded_again(chunk.batch) if states is None else states
            states = states[chunk.rows].to(device)
        else:
            states = torch.empty(len(chunk.rows), *chunk.states, dtype=self.dtype, device=device)
        return _restored(broadcast(states, chunk.rank), None)

    def _encoded_again(self, number: int) -> Tensor:
        """The image states of one of this rank's batches for which there was no room."""
        if self._again is None or self._at > number:
            self._again, self._at = iter(self.batches), 0
        while True:
            batch = next(self._again)
            self._at += 1
            if self._at > number:
                with autocast(self.world.device, self.how.precision):
                    return self._kept(self._encode_images(batch))

    def texts(self, slots: Tensor) -> Encoded:
        """The texts of some slots (texts,) of this rank."""
        keys = [self._keys[slot] for slot in slots.tolist()]
        kept = [self.text_states.get(self._text_numbers[key]) for key in keys]
        lacking = [i for i, states in enumerate(kept) if states is None]
        if lacking:
            with autocast(self.world.device, self.how.precision):
                states = self._kept(self._encode_keys([keys[i] for i in lacking]))
            for i, one in zip(lacking, states, strict=True):
                kept[i] = one[:, : _tokens(keys[i])]
        lengths = torch.tensor([_tokens(key) for key in keys])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = kept[0].new_zeros(len(kept), kept[0].shape[0], mask.shape[1], kept[0].shape[2])
        for row, states in zip(padded, kept, strict=True):
            row[:, : states.shape[1]] = states
        return _restored(padded.to(self.world.device), mask.to(self.world.device))

    def scores(self, images: Encoded, pairs: Tensor) -> Tensor:
        """pairs (pairs, 2), rows of `images` and slots -> scores (pairs,) float32 on the CPU."""
        found = [torch.empty(0)]
        for piece in pairs.split(self.pairs) if len(pairs) else ():
            slots, rows = piece[:, 1].unique(return_inverse=True)
            texts = self.texts(slots)
            with autocast(self.world.device, self.how.precision):
                piece = torch.stack([piece[:, 0], rows], dim=1).to(self.world.device)
                found.append(self._fuse(images, texts, piece))
        scores = torch.cat(found)
        self._finite(scores.numpy())
        return scores

    def _fuse(self, images: Encoded, texts: Encoded, pairs: Tensor) -> Tensor:
        (images, image_rows), (texts, text_rows) = images.used(pairs[:, 0]), texts.used(pairs[:, 1])
        rows = torch.stack([image_rows, text_rows], dim=1)
        return self.ranker.score(self.tower.fuse(images, texts, rows, Need(cls=True)).cls).float().cpu()


def image_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """The images that the batch's pairs name, and (captions,) the row of each pair's image among them."""
    return batch.pairs[:, 0].unique(return_inverse=True)


def _tokens(key: bytes) -> int:
    return len(key) // np.dtype(np.int32).itemsize


def _restored(states: Tensor, mask: Tensor | None) -> Encoded:
    """States (rows, layers, tokens, width) as fuse reads them; it reads no cls."""
    layers = list(states.float().unbind(1))
    return Encoded(layers, layers[-1][:, 0], mask)
