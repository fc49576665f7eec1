"""What every command that needs a model puts together from a run's configuration: tokenizer, model, loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class

from bt.config import Config, DataConfig
from bt.config.schema import BRIDGE_OPTIONS
from bt.data.collate import BatchMaker
from bt.data.dataset import Loader, eval_loader, train_loader
from bt.data.device import DeviceTransform, distance
from bt.data.mix import MixedPlan
from bt.data.plan import EvalPlan, PairIndex, TrainPlan, choose_samples
from bt.data.shards import BadSample, ShardSet
from bt.data.text import Tokenizer, load_tokenizer, make_tokenizer
from bt.data.transforms import UNDECODABLE, Transform, make_transform
from bt.engine.distributed import World
from bt.engine.initial import weights_file
from bt.errors import CheckpointError, ConfigError
from bt.models.bridgetower import build_tower
from bt.tasks.base import Context, Objective, TaskModel

# Compiled layers are compiled again for new shapes.
TEXT_MULTIPLE = 8
# Evaluation draws (ITM pairs, masks) are the same for every training seed, so that runs can be compared.
EVALUATION_SEED = 0


def open_shards(data: DataConfig, split: str | Sequence[str], each: bool = True) -> ShardSet:
    """The samples of a split of data.dir; see ShardSet for `each`.

    A place `samples:NAME` is a few real samples in the form of the data set NAME (bt.samples.offline), which are made
    in data/samples/NAME of the working directory when they are first asked for.
    """
    places = [_made(place) for place in ([data.dir] if isinstance(data.dir, str) else data.dir)]
    return ShardSet(places, split, data.cache_dir, each)


def _made(place: str) -> str:
    scheme, _, name = place.partition(":")
    if scheme != "samples":
        return place
    from bt.samples.offline import offline_shards

    return str(offline_shards(name, Path("data/samples")))


def find_tokenizer(cfg: Config, run_dir: Path, train: ShardSet) -> Tokenizer:
    """The run's own tokenizer if it has one already, else that of init_from, else a new one."""
    kept = run_dir / "tokenizer.json"
    if kept.is_file():
        return load_tokenizer(kept)
    if cfg.init_from and cfg.encoder.text["tokenizer"].get("kind") == "trained":
        return tokenizer_of(weights_file(cfg.init_from))
    texts = train.all_texts(skip_bad=cfg.data.on_bad_sample == "skip")
    return make_tokenizer(texts=texts, **cfg.encoder.text["tokenizer"])


def tokenizer_of(weights: Path) -> Tokenizer:
    """The tokenizer that was trained with the weights: ids mean what they meant then."""
    kept = weights.with_name("tokenizer.json")
    if not kept.is_file():
        raise CheckpointError(f"{weights} has no tokenizer.json beside it, which its text encoder was trained with")
    return load_tokenizer(kept)


def build_model(
    cfg: Config, tokenizer: Tokenizer, labels: Mapping[str, list[str]], *, pretrained: bool = True
) -> TaskModel:
    """The tower and the task's objectives, new weights drawn from cfg.seed.

    pretrained: False where all of the tower's weights are loaded afterwards, so that the encoders' own, which the
    configuration names, need not be at hand.
    """
    torch.manual_seed(cfg.seed)
    encoder, vocab_size = asdict(cfg.encoder), tokenizer.vocab_size
    if not pretrained:
        if encoder["text"].get("pretrained"):
            # A pre-trained encoder has the rows of its own configuration, which can be more than the tokenizer's.
            encoder["text"]["pretrained"], vocab_size = False, None
        encoder["vision"] = without_weights(encoder["vision"])
    bridge = {key: value for key, value in cfg.bridge.items() if key not in BRIDGE_OPTIONS}
    kinds = {name: get_class(node["_target_"]) for name, node in cfg.task.objectives.items()}
    tower = build_tower(
        encoder,
        bridge,
        cfg.cross,
        vocab_size=vocab_size,
        pad_id=tokenizer.pad_id,
        token_types=max((kind.token_types for kind in kinds.values()), default=2),
        **{key: cfg.bridge[key] for key in BRIDGE_OPTIONS if key in cfg.bridge},
    )
    if cfg.cross["layers"] == 0 and (fusing := [name for name, kind in kinds.items() if kind.fuses]):
        raise ConfigError(f"cross.layers=0: {', '.join(fusing)} of task.objectives needs cross-modal layers")
    if cfg.data.max_text_len > tower.text.max_positions:
        raise ConfigError(
            f"data.max_text_len={cfg.data.max_text_len}: encoder.text takes at most {tower.text.max_positions} tokens"
        )
    context = Context(tower.width, tower.text.width, tower.vision.width, tokenizer, labels)
    objectives = {name: _objective(name, kind, context, cfg.task.objectives[name]) for name, kind in kinds.items()}
    evaluators = {name: get_class(node["_target_"])(**_arguments(node)) for name, node in cfg.task.evaluators.items()}
    tower.set_gradient_checkpointing(cfg.trainer.gradient_checkpointing)
    return TaskModel(tower, objectives, evaluators, cfg.task.batch_metrics)


def _objective(name: str, kind: type, context: Context, node: Mapping[str, Any]) -> Objective:
    try:
        return kind(context, **_arguments(node))
    except ConfigError as error:
        raise ConfigError(f"task.objectives.{name}: {error}") from error


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "_target_"}


def without_weights(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder.vision node of the same architecture with random weights."""
    vision = dict(vision)
    if vision.get("pretrained") and vision.get("name"):
        from bt.models.encoders.open_clip_vit import Architecture, OpenClipVision  # open_clip is slow to import

        if issubclass(get_class(vision["_target_"]), OpenClipVision):
            # The weights' tag says the activation where the name does not (ViT-B-16 with openai's).
            sizes = Architecture.of_name(vision["name"], vision["pretrained"])
            vision |= {"name": None, "architecture": asdict(sizes)}
    if vision.get("pretrained"):
        vision["pretrained"] = None
    return vision


def micro_batches(global_batch: int, ranks: int, most: int | None) -> int:
    """How many micro-batches each rank takes for a step of exactly `global_batch` pairs: of `most` pairs each, or one
    of all that a rank has where that is less.

    ConfigError with the two nearest batches that can be met where this one cannot: a batch is never rounded.
    """
    single = most is None or global_batch <= ranks * most
    unit = ranks if single else ranks * most
    if global_batch % unit:
        below = global_batch // unit * unit
        nearest = f"{below} and {below + unit}" if below else str(unit)
        raise ConfigError(
            f"global_batch={global_batch} is not a multiple of {ranks} ranks{'' if single else f' x {most} pairs'} "
            f"(trainer.micro_batch={'null' if most is None else most}): the nearest that are: {nearest}"
        )
    return 1 if single else global_batch // unit


class Data:
    """The loaders of a run, and what is to be known of its training data before them."""

    def __init__(self, cfg: Config, world: World, model: TaskModel, tokenizer: Tokenizer):
        self.cfg, self.world, self.model, self.tokenizer = cfg, world, model, tokenizer

    def maker(self, shards: ShardSet, index: PairIndex, transform: str, seed: int, training: bool) -> BatchMaker:
        objectives, data = self.model.objectives, self.cfg.data
        return BatchMaker(
            shards,
            index,
            text_field=self.cfg.task.texts,
            tokenizer=self.tokenizer,
            transform=self.transform(transform),
            seed=seed,
            max_text_len=data.max_text_len,
            text_multiple=TEXT_MULTIPLE if self.cfg.trainer.compile else 1,
            targets={name: objective.targets for name, objective in objectives.items()},
            needs=[objective.needs for objective in objectives.values()],
            on_bad_sample=data.on_bad_sample,
            substitute=training,
        )

    def transform(self, name: str) -> Transform | DeviceTransform:
        vision, data = self.model.tower.vision, self.cfg.data
        options = {"randaug": data.randaug, "resize": data.resize, "decode_draft": data.decode_draft}
        transform = make_transform(name, vision.image_size, vision.channels, **options)
        return DeviceTransform(transform, self.world.device) if data.decode_on == "device" else transform

    def pixel_note(self, shards: ShardSet, name: str) -> str | None:
        """How far a transform's pixels are from the official ones, on the first image that can be read.

        None where they are those, and without images.
        """
        transform, data = self.transform(name), self.cfg.data
        if data.resize == "pil" and not data.decode_draft:
            return None
        options = (
            f"data.resize={data.resize}, decode_draft={str(data.decode_draft).lower()}, decode_on={data.decode_on}"
        )
        for number in range(min(len(shards), 100)):
            try:
                for image in shards.read(number).images.values():
                    mean, largest = distance(transform, image)
                    found = f"{mean:.4f} grey levels from the official pixels on average, at most {largest}"
                    return f"{options}: {found} (the first image)"
            except (BadSample, *UNDECODABLE):
                continue
        return None

    def plan(self, shards: ShardSet) -> TrainPlan | MixedPlan:
        data, world = self.cfg.data, self.world
        accumulation = micro_batches(self.cfg.global_batch, world.size, self.cfg.trainer.micro_batch)
        chosen = choose_samples(len(shards), data.fraction, data.max_samples)
        counts = shards.counts(self.cfg.task.texts)
        index = PairIndex(counts, chosen)
        draw = {"seed": self.cfg.seed, "global_batch": self.cfg.global_batch}
        share = {"world": world.size, "rank": world.rank, "accumulation": accumulation}
        order = {
            "texts_per_image": data.texts_per_image,
            "order": data.order,
            "shuffle_shards": data.shuffle_shards,
        }
        if data.weights is None:
            return TrainPlan(index, shards.starts, **draw, **share, **order)
        edges = np.searchsorted(chosen, shards.parts)
        parts = [PairIndex(counts, chosen[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        plans = [TrainPlan(part, shards.starts, **draw, **order) for part in parts]
        return MixedPlan(index, plans, data.weights, **draw, **share)

    def train(self, shards: ShardSet, plan: TrainPlan | MixedPlan, start_step: int, total_steps: int) -> Loader:
        data = self.cfg.data
        return train_loader(
            plan,
            self.maker(shards, plan.index, data.train_transform, self.cfg.seed, training=True),
            start_step=start_step,
            total_steps=total_steps,
            workers=data.workers,
            prefetch=data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )

    def evaluation(self, split: str | list[str]) -> Loader:
        data, world = self.cfg.data, self.world
        shards = open_shards(data, split, each=False)
        chosen = choose_samples(len(shards), most=self.cfg.eval.max_samples)
        index = PairIndex(shards.counts(self.cfg.task.texts), chosen)
        plan = EvalPlan(index, seed=EVALUATION_SEED, batch=self.cfg.eval.batch, world=world.size, rank=world.rank)
        return eval_loader(
            plan,
            self.maker(shards, index, data.eval_transform, EVALUATION_SEED, training=False),
            workers=data.workers,
            prefetch=data.prefetch,
            pin_memory=world.device.type == "cuda",
        )
