"""Retrieval evaluation beside the released code's: encoded once on both sides, then fused pair by pair."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bt.bench.case import Case
from bt.bench.models import Size, make_batch, make_model
from bt.bench.official import encode_officially, fuse_officially
from bt.data.batch import Batch
from bt.engine.distributed import World
from bt.tasks.base import Measuring, TaskModel
from bt.tasks.gallery import Chunk, Gallery
from bt.tasks.irtr import IRTR
from bt.tasks.recall import TopK

WORLD = World(0, 1, torch.device("cpu"))
K_TEST = 16


def open_gallery(model: TaskModel, batch: Batch) -> Gallery:
    return Gallery(
        model.tower,
        [batch],
        WORLD,
        Measuring("test"),
        ranker=model.objectives["irtr"],
        contrast=None,
        pairs=256,
        half=False,
    )


def make_peer_model(model: TaskModel, size: Size) -> TaskModel:
    peer = make_model(size, lambda context: {"irtr": IRTR(context)}).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def retrieval_all(size: Size, images: int = 4, texts: int = 20) -> Case:
    """All pairs, from pixels and token ids to the matrix of scores."""
    model = make_model(size, lambda context: {"irtr": IRTR(context)}).eval()
    peer, batch = make_peer_model(model, size), make_batch(size, images, texts // images)
    every = [torch.arange(texts)] * images

    @torch.no_grad()
    def ours() -> Tensor:
        gallery = open_gallery(model, batch)
        (chunk,) = gallery.chunks
        scores = torch.empty(images, gallery.slots)
        captions, rows, slots = gallery.own_pairs(chunk)
        scores[rows, slots] = torch.from_numpy(gallery.own)[captions]  # scored while they were encoded
        others = torch.ones(images, gallery.slots, dtype=torch.bool).index_put_((rows, slots), torch.tensor(False))
        scores[others] = gallery.scores(gallery.states_of(chunk), others.nonzero())
        return scores[:, torch.from_numpy(gallery.caption_slot)]

    def theirs() -> Tensor:
        encoded = encode_officially(peer, batch, size.max_tokens)
        return fuse_officially(encoded, peer.objectives["irtr"], every).view(images, texts)

    return Case(images * texts, ours, theirs, flops=True)


def retrieval_topk(size: Size, images: int = 100, texts: int = 500) -> Case:
    """Fusing two images with 20 texts each; `whole`: as often as a split of `images` and `texts` needs it, all pairs in
    the released way, and ITC's top 16 of every image and text with the right pairs here."""
    model = make_model(size, lambda context: {"irtr": IRTR(context)}).eval()
    peer, batch = make_peer_model(model, size), make_batch(size, 2, 20)
    gallery = torch.no_grad()(open_gallery)(model, batch)
    (chunk,) = gallery.chunks
    states = gallery.states_of(chunk)
    captions = torch.from_numpy(gallery.caption_slot)
    some = captions[:20]  # of 40 texts
    pairs = torch.cartesian_prod(torch.arange(2), some)
    counts = pairs_of_topk(images, texts), images * texts

    @torch.no_grad()
    def ours() -> Tensor:
        return gallery.scores(states, pairs)

    encoded = encode_officially(peer, batch, size.max_tokens)

    def theirs() -> Tensor:
        return fuse_officially(encoded, peer.objectives["irtr"], [torch.arange(20)] * 2)

    whole = tuple(count / len(pairs) for count in counts)
    notes = {"pairs": {"ours": counts[0], "peer": counts[1]}, "work": f"{images} images, {texts} texts"}
    return Case(texts, ours, theirs, unit="texts/s", whole=whole, notes=notes, flops=True, holds=gallery)


def pairs_of_topk(images: int, texts: int) -> int:
    """Pairs that are fused: right ones, and what TopK chooses by features that know nothing, so that few coincide."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.arange(texts)
    features = SimpleNamespace(
        world=WORLD,
        image_features=torch.nn.functional.normalize(torch.randn(images, 256, generator=draw), dim=1),
        text_features=torch.nn.functional.normalize(torch.randn(texts, 256, generator=draw), dim=1),
        slot_captions=rows,
        caption_slot=rows.numpy(),
        slots=texts,
    )
    chosen = TopK(features, K_TEST).of(Chunk(0, np.arange(images), 0, 0, None))
    chosen[rows // (texts // images), rows] = True
    return int(chosen.sum())
