"""What the bridges do: states of the layers, how alike they are, and what managers and attention take of what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt.assemble import Data, build_model, open_shards, tokenizer_of
from bt.config import Config, read_config
from bt.config.targets import add_plugins
from bt.data.batch import Batch
from bt.data.text import Tokenizer
from bt.engine.distributed import World
from bt.engine.initial import load_weights
from bt.errors import ConfigError, DataError
from bt.models.bridges.manager import ManagerBridge
from bt.models.bridgetower import BridgeTower, Encoded, Need
from bt.report.runs import Run
from bt.report.write import Picture
from bt.tasks.base import TaskModel

MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Opened:
    """A trained model in evaluation mode, and a batch of its data, both on the CPU."""

    config: Config
    model: TaskModel
    tokenizer: Tokenizer
    batch: Batch

    @property
    def tower(self) -> BridgeTower:
        return self.model.tower

    @torch.no_grad()
    def encode(self) -> tuple[Encoded, Encoded]:
        """The batch's images and texts after their encoders."""
        pixels = self.tower.vision.normalize(self.batch.images)
        return self.tower.encode_images(pixels), self.tower.encode_texts(self.batch.texts)

    def words(self, text: int) -> list[str]:
        """The tokens of a text of the batch, without padding."""
        ids, mask = self.batch.texts.ids[text], self.batch.texts.mask[text]
        return [self.tokenizer.backend.id_to_token(int(number)) for number in ids[mask]]

    def pixels(self, image: int) -> Any:
        """(height, width, channels) uint8, as the encoder gets it."""
        return self.batch.images[image].permute(1, 2, 0).cpu().numpy()


def open_run(run: Run | Path, pairs: int = 64, split: str | None = None) -> Opened:
    """The best checkpoint of a finished run, and the first `pairs` pairs of a split (None: its validation split).

    run: of a store, or a run directory. Relative paths of its configuration start in the working directory. Raises
    DataError where the checkpoint is gone.
    """
    folder = run.checkpoint if isinstance(run, Run) else Path(run) / "checkpoints" / "best"
    weights, run_dir = folder / "model.safetensors", folder.parent.parent
    if not weights.is_file():
        raise DataError(f"{weights} is not there: was the run directory moved?")
    config = read_config(run_dir)
    add_plugins(config.plugins)
    tokenizer = tokenizer_of(weights)
    shards = open_shards(config.data, split or config.data.val_split, each=False)
    model = build_model(config, tokenizer, shards.labels, pretrained=False)
    load_weights(weights, model, labels=shards.labels)
    config.eval.batch, config.data.workers = pairs, 0
    config.eval.max_samples = pairs
    batch = next(
        iter(
            Data(config, World(0, 1, torch.device("cpu")), model, tokenizer).evaluation(split or config.data.val_split)
        )
    )
    return Opened(config, model.eval().requires_grad_(False), tokenizer, batch)


@dataclass(frozen=True)
class States:
    """The states of one modality for every pair: uni-modal ones as the bridges read them, bottom first, and the outputs
    of the cross-modal layers; (pairs, tokens, width) each. mask: (pairs, tokens) bool, None without padding."""

    uni: list[Tensor]
    cross: list[Tensor]
    mask: Tensor | None


@torch.no_grad()
def layer_states(opened: Opened) -> dict[str, States]:
    """By modality."""
    tower, pairs = opened.tower, opened.batch.pairs
    images, texts = opened.encode()
    outputs: list[tuple[Tensor, Tensor]] = []
    hook = tower.cross.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        tower.fuse(images, texts, pairs, Need(text=True, image=True))
    finally:
        hook.remove()
    uni = {"text": [state[pairs[:, 1]] for state in texts.states], "image": [s[pairs[:, 0]] for s in images.states]}
    masks = {"text": texts.mask[pairs[:, 1]], "image": None}
    return {
        name: States(uni[name], [output[side] for output in outputs], masks[name])
        for side, name in enumerate(MODALITIES)
    }


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two sets of states of the same n tokens, (n, width) each, in [0, 1]: 1 for
    states that differ by a rotation and a factor (Kornblith et al. 2019, arXiv 1905.00414)."""
    one, other = one.double() - one.double().mean(0), other.double() - other.double().mean(0)
    shared = (other.T @ one).square().sum()
    return float(shared / ((one.T @ one).norm() * (other.T @ other).norm()).clamp_min(1e-30))


def layer_similarity(states: States) -> tuple[list[str], Tensor]:
    """How alike the layers of a modality are: their names, and linear CKA over all tokens, (layers, layers)."""
    names = [f"uni -{len(states.uni) - number}" for number in range(len(states.uni))]
    names += [f"cross {number + 1}" for number in range(len(states.cross))]
    keep = torch.ones(states.uni[0].shape[:2], dtype=torch.bool) if states.mask is None else states.mask
    flat = [state[keep] for state in (*states.uni, *states.cross)]
    table = torch.eye(len(flat))
    for i, one in enumerate(flat):
        for j in range(i):
            table[i, j] = table[j, i] = linear_cka(one, flat[j])
    return names, table


@contextmanager
def _recorded(module: torch.nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of a module's calls."""
    calls: list[tuple[tuple, dict]] = []
    hook = module.register_forward_pre_hook(lambda _, given, named: calls.append((given, named)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@torch.no_grad()
def manager_weights(opened: Opened) -> dict[str, Tensor]:
    """By modality: (cross-modal layers, managed layers), the mean share of each managed uni-modal layer, bottom first,
    over the width and, where it depends on them, over the tokens of the batch. Rows add up to 1.

    ConfigError for a model whose bridges are no managers.
    """
    tower, found = opened.tower, {}
    for name in MODALITIES:
        bridge = getattr(tower, f"{name}_bridge")
        if not isinstance(bridge, ManagerBridge):
            continue
        images, texts = opened.encode()  # anew: a second pass over them would not call the first layer's bridge
        with _recorded(bridge) as calls:
            tower.fuse(images, texts, opened.batch.pairs, Need(cls=True))
        rows = []
        for (layer, _, _, own, other), masks in calls:
            shares = bridge.shares(layer, own, other, masks.get("other_mask"))  # (B, managed, S, D), some of them 1
            mask = masks.get("own_mask")
            if shares.shape[2] > 1 and mask is not None:
                rows.append(shares[..., 0].transpose(1, 2)[mask].mean(0))
            else:
                rows.append(shares.mean(dim=(0, 2, 3)))
        found[name] = torch.stack(rows)
    if not found:
        raise ConfigError("bridge: the model has no managers (bridge=static_managers, adaptive_managers)")
    return found


def attention_of_pair(opened: Opened, pair: int, layer: int = -1) -> tuple[Tensor, Tensor]:
    """Cross-attention of one pair, mean over heads: what each word takes of each image token (words, image tokens),
    and what each image token takes of each word (image tokens, words). ConfigError where the cross-modal encoder has
    only one of them."""
    images, texts = opened.encode()
    maps = opened.tower.attention_maps(images, texts, opened.batch.pairs[pair : pair + 1])[layer]
    words = int(opened.batch.texts.mask[opened.batch.pairs[pair, 1]].sum())
    if maps.text_to_image is None or maps.image_to_text is None:
        raise ConfigError("cross: this cross-modal encoder has no attention in both directions")
    return maps.text_to_image[0].mean(0)[:words], maps.image_to_text[0].mean(0)[:, :words]


def draw_matrix(axes: Any, table: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Numbers as colours, with their names and values."""
    axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=9)
    middle = float(table.min() + table.max()) / 2
    for i in range(len(rows)):
        for j in range(len(columns)):
            value = float(table[i, j])
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6,
                      color="black" if value > middle else "white")  # fmt: skip


def draw_similarity(opened: Opened) -> Picture:
    made = Picture(11, 5)
    states = layer_states(opened)
    for axes, name in zip(made.subplots(1, 2), MODALITIES, strict=True):
        names, table = layer_similarity(states[name])
        draw_matrix(axes, table, names, names, f"{name}: linear CKA of the layers")
    return made


def draw_managers(opened: Opened) -> Picture:
    weights = manager_weights(opened)
    made = Picture(4.5 * len(weights), 3.2)
    for axes, (name, table) in zip(made.subplots(1, len(weights), squeeze=False)[0], weights.items(), strict=True):
        columns = [f"uni -{table.shape[1] - number}" for number in range(table.shape[1])]
        rows = [f"cross {number + 1}" for number in range(table.shape[0])]
        draw_matrix(axes, table, rows, columns, f"{name}: share of each managed layer")
    return made


def draw_attention(opened: Opened, pair: int, layer: int = -1) -> Picture:
    """The image of a pair, then for each word where it looks in it. ConfigError for image tokens in no square grid."""
    reads, _ = attention_of_pair(opened, pair, layer)
    words = opened.words(int(opened.batch.pairs[pair, 1]))
    side = round((reads.shape[1] - 1) ** 0.5)
    if side * side != reads.shape[1] - 1:
        raise ConfigError(f"encoder.vision: {reads.shape[1]} tokens are no class token and a square grid")
    picture = opened.pixels(int(opened.batch.pairs[pair, 0]))
    height, width = picture.shape[:2]
    columns = min(6, len(words) + 1)
    lines = -(-(len(words) + 1) // columns)
    made = Picture(1.7 * columns, 1.9 * lines)
    grid = made.subplots(lines, columns, squeeze=False).flat
    for number, axes in enumerate(grid):
        axes.axis("off")
        if number <= len(words):
            axes.imshow(picture.squeeze(), extent=(0, width, height, 0), cmap="gray" if picture.shape[2] == 1 else None)
        if 1 <= number <= len(words):
            heat = reads[number - 1, 1:].view(side, side)
            axes.imshow(heat, extent=(0, width, height, 0), alpha=0.55, cmap="inferno", interpolation="bilinear")
            axes.set_title(words[number - 1], fontsize=8)
    return made
