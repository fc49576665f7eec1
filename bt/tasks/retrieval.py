"""Image-text retrieval over a whole split: recalls at 1, 5 and 10 in both directions.

Official compute_irtr_recall (all pairs), compute_irtr_itm_itc_recall (re-ranking) and compute_irtr_itc_recall
(similarity alone). The official recipes measure on the test split where they say validation; here `val` is val.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bt.data.batch import Batch
from bt.engine.distributed import World, all_sum, gather_objects
from bt.engine.progress import Countdown
from bt.errors import ConfigError
from bt.models.checks import check_range
from bt.tasks.base import Evaluator, Measuring, Objective, TaskModel
from bt.tasks.gallery import Chunk, Gallery
from bt.tasks.recall import Ranks, TopK


class Retrieval(Evaluator):
    """Every caption of the split looks for its image (ir_r1, ...), every image for any of its captions (tr_r1, ...).

    ranker: the objective that scores pairs, by name (irtr: rank head; itm: match logit). contrast: the objective whose
    uni-modal features are compared (itc). k_test: the ranker scores the k_test captions most similar to each image and
    the k_test images most similar to each caption alone, everything else is behind them (official: -100); None: all
    pairs. Without a ranker similarity alone decides. Recalls are shares in 0...1; tr_mean, ir_mean, r_mean are means,
    rsum the sum of the six. A hit has to be strictly better than what it beats: equal scores count as misses.

    splits: measured splits by their part in the run (val, test); None: all. The official 16-way recipe measures only
    the test split: all pairs are many.
    pairs: in one forward pass. half: keep uni-modal states in fp16 between passes; None: unless precision is fp32.

    Images and texts are encoded once (in batches of eval.batch captions). Their states wait in main memory, as far as
    Measuring.cache_bytes goes on each rank, then on disk; images that find no room are encoded again. Each rank scores
    the texts of its batches with all images, which the ranks send to each other. After each batch of images rank 0
    writes the counts so far, with which an evaluation of the same weights and data goes on.
    """

    def __init__(
        self,
        ranker: str | None = "itm",
        contrast: str | None = None,
        k_test: int | None = None,
        splits: list[str] | None = None,
        pairs: int = 256,
        half: bool | None = None,
    ):
        if ranker is None and contrast is None:
            raise ConfigError("Retrieval: ranker and contrast are both null, nothing would be compared")
        if k_test is not None and (ranker is None or contrast is None):
            raise ConfigError(f"Retrieval.k_test={k_test} needs both ranker and contrast")
        if k_test is not None:
            check_range("Retrieval.k_test", k_test, at_least=1)
        check_range("Retrieval.pairs", pairs, at_least=1)
        self.ranker, self.contrast, self.k_test = ranker, contrast, k_test
        self.splits, self.pairs, self.half = splits, pairs, half

    def check(self, objectives: Mapping[str, Objective]) -> None:
        for option, method in (("ranker", "score"), ("contrast", "image_features")):
            name = getattr(self, option)
            if name is not None and not hasattr(objectives.get(name), method):
                fitting = [other for other, objective in objectives.items() if hasattr(objective, method)]
                raise ConfigError(
                    f"Retrieval.{option}={name}: the task's objectives allow {', '.join([*fitting, 'null'])}"
                )

    def __call__(self, model: TaskModel, batches: Sequence[Batch], world: World, how: Measuring) -> dict[str, float]:
        if self.splits is not None and how.split not in self.splits:
            return {}
        gallery = Gallery(
            model.tower,
            batches,
            world,
            how,
            ranker=None if self.ranker is None else model.objectives[self.ranker],
            # Similarity is not asked where every pair is scored.
            contrast=model.objectives[self.contrast] if self.k_test or self.ranker is None else None,
            pairs=self.pairs,
            half=how.precision != "fp32" if self.half is None else self.half,
        )
        try:
            partial = Partial(how, world, {**vars(self), **self._sizes(gallery), "weights": fingerprint(model)})
            ranks = self._rank(gallery, partial)
            partial.remove()
        finally:
            gallery.close()
        return ranks.recalls()

    @staticmethod
    def _sizes(gallery: Gallery) -> dict[str, int]:
        return {"images": gallery.images, "captions": gallery.captions, "chunks": len(gallery.chunks)}

    def _rank(self, gallery: Gallery, partial: Partial) -> Ranks:
        chosen = TopK(gallery, self.k_test) if self.k_test else None

        def scores_of(chunk: Chunk) -> Tensor:
            return gallery.similarity(chunk) if self.ranker is None else self._fused(gallery, chunk, chosen)

        own = torch.from_numpy(gallery.own) if self.ranker else _own(gallery, gallery.similarity)
        if chosen:
            own.masked_fill_(_own(gallery, chosen.of) == 0, -torch.inf)
        ranks = Ranks(gallery, own)
        done = partial.load(ranks)
        start = gallery.chunks[done].first if done < len(gallery.chunks) else gallery.images
        progress = Countdown("retrieval", gallery.images, "image", start, shown=gallery.world.main)
        for number, chunk in enumerate(gallery.chunks[done:], done):
            ranks.add(chunk, scores_of(chunk))
            partial.save(number + 1, ranks)
            progress.add(len(chunk.rows))
        progress.close()
        return ranks

    @staticmethod
    def _fused(gallery: Gallery, chunk: Chunk, chosen: TopK | None) -> Tensor:
        """(images of the chunk, slots) scores of the ranker, -inf where it is not asked; right pairs are known."""
        shape = len(chunk.rows), gallery.slots
        wanted = chosen.of(chunk) if chosen else torch.ones(shape, dtype=torch.bool)
        _, rows, slots = gallery.own_pairs(chunk)
        wanted[rows, slots] = False
        scores = torch.full(shape, -torch.inf)
        states = gallery.states_of(chunk)  # the ranks send them to each other, so every rank asks
        if wanted.any():
            scores[wanted] = gallery.scores(states, wanted.nonzero())
        return scores


def _own(gallery: Gallery, values: Callable[[Chunk], Tensor]) -> Tensor:
    """(captions,) float32: of `values` (images of a chunk, slots) that of each caption with its image."""
    found = torch.zeros(gallery.captions)
    for chunk in gallery.chunks:
        captions, rows, slots = gallery.own_pairs(chunk)
        found[captions] = values(chunk)[rows, slots].float()
    return all_sum(found)


def fingerprint(model: nn.Module) -> str:
    """Tells weights apart that Measuring.identity may not: of a run that was repeated from an older checkpoint."""
    sums = torch.stack([parameter.double().sum() for parameter in model.parameters()]).detach()
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()


class Partial:
    """The counts so far, in a file of rank 0 that holds for one evaluation: same weights, data and options."""

    def __init__(self, how: Measuring, world: World, what: Mapping):
        self.main, self.path = world.main, None
        if how.work_dir is not None:
            text = json.dumps([how.identity, how.split, how.precision, what], sort_keys=True)
            self.path = Path(how.work_dir) / f"retrieval-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"

    def load(self, ranks: Ranks) -> int:
        """Takes up what is there; returns how many chunks are done."""
        found = None
        if self.main and self.path is not None and self.path.is_file():
            with np.load(self.path) as file:
                found = dict(file)
        found = gather_objects(found)[0]
        if found is None:
            return 0
        ranks.captions, ranks.images = torch.from_numpy(found["captions"]), torch.from_numpy(found["images"])
        return int(found["done"])

    def save(self, done: int, ranks: Ranks) -> None:
        if not self.main or self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")
        with open(temporary, "wb") as file:
            np.savez(file, done=done, captions=ranks.captions.numpy(), images=ranks.images.numpy())
        temporary.replace(self.path)

    def remove(self) -> None:
        if self.main and self.path is not None:
            self.path.unlink(missing_ok=True)
