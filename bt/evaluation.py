"""Evaluation of weights that exist already, on a split of their own or of other data."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bt.assemble import Data, build_model, open_shards, tokenizer_of
from bt.config import Config, config_hash, diff_configs
from bt.config.explain import explain
from bt.config.record import other_settings, read_recorded, to_config
from bt.config.schema import check_run, check_values
from bt.config.targets import add_plugins, check_model_targets
from bt.data.text import make_tokenizer
from bt.engine import distributed, report, watch
from bt.engine.distributed import World
from bt.engine.evaluate import evaluate
from bt.engine.initial import load_weights, weights_file
from bt.engine.progress import table
from bt.errors import CheckpointError, ConfigError, DataError
from bt.tasks.base import Measuring
from bt.training import set_numerics, write_predictions

log = logging.getLogger("bt")

# Groups whose options set keys all over the configuration, which a finished run has already.
GLOBAL_GROUPS = ("experiment", "trainer", "sweep")


def evaluate_run(cfg: Config) -> float | None:
    """Evaluates cfg.run_dir's best checkpoint (or cfg.init_from) on cfg.split.

    Returns the task's objective metric, as measured on that split.
    """
    with distributed.joined(cfg.trainer.device, cfg.trainer.timeout_minutes) as world:
        watch.mark(None, f"evaluating {cfg.split}")
        split, source, overrides = cfg.split, cfg.init_from or cfg.run_dir, changes()
        if not source:
            raise ConfigError("give run_dir=DIR of a trained run, or init_from=PATH with task and data")
        out_dir = Path(cfg.run_dir or f"evaluations/{cfg.name}-{config_hash(cfg)[:8]}").expanduser()
        if cfg.init_from and (out_dir / "config.yaml").exists():
            raise ConfigError(f"run_dir={cfg.run_dir} holds a run of its own: give another, or no init_from")
        if not cfg.init_from:
            cfg, own = stored_config(cfg, overrides), read_recorded(out_dir)
            if diff_configs(own, cfg):
                out_dir = out_dir / "evaluations" / sha256(f"{config_hash(cfg)} {split}".encode()).hexdigest()[:8]
        return evaluate_weights(cfg, world, weights_file(source), split, out_dir)


def changes() -> list[Override]:
    """What the command line says beside run_dir and split."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [override for override in overrides if override.key_or_group not in ("run_dir", "split")]


def stored_config(cfg: Config, overrides: list[Override]) -> Config:
    """The configuration of cfg.run_dir with what the command line changes in it."""
    stored = OmegaConf.create(read_recorded(Path(cfg.run_dir).expanduser()))
    for override in overrides:
        key = override.key_or_group.replace("/", ".")
        if override.is_delete():
            raise ConfigError(f"{override.input_line} does not go with run_dir: options are changed, not removed")
        if key in GLOBAL_GROUPS:
            raise ConfigError(f"{key}={override.value()} does not go with run_dir: the run's own configuration holds")
        OmegaConf.update(stored, key, select(cfg.recorded, key), merge=False)
    try:
        merged = to_config(OmegaConf.merge(OmegaConf.structured(Config), stored))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{cfg.run_dir}/config.yaml: {explain(error)}") from error
    check_values(merged)
    add_plugins(merged.plugins)
    check_run(merged)
    check_model_targets(merged)
    return merged


def select(node: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        node = node[part]
    return node


def evaluate_weights(cfg: Config, world: World, weights: Path, split: str, out_dir: Path) -> float | None:
    set_numerics(cfg)
    # Metrics call the splits by their part in the run, whatever the data set calls them.
    parts = {"train": cfg.data.train_split, "val": cfg.data.val_split, "test": cfg.data.test_split}
    where = parts.get(split, split)
    shards = open_shards(cfg.data, where, each=False)
    # The ids that the weights know, whatever a tokenizer of that name gives by now, and off the network.
    if weights.with_name("tokenizer.json").is_file() or cfg.encoder.text["tokenizer"]["kind"] == "trained":
        tokenizer = tokenizer_of(weights)
    else:
        tokenizer = make_tokenizer(texts=(), **cfg.encoder.text["tokenizer"])
    model = build_model(cfg, tokenizer, shards.labels, pretrained=False)
    loaded = load_weights(weights, model, labels=shards.labels)
    if loaded.new:
        raise CheckpointError(f"{weights} has no trained head for {', '.join(loaded.new)}")
    if world.main:
        log.info(str(loaded))
        if cfg.init_from and (others := other_settings(weights, cfg)):
            log.warning(f"otherwise than {cfg.init_from} was trained: {'; '.join(others)}")
    model.to(world.device)
    data = Data(cfg, world, model, tokenizer)
    if world.main and (note := data.pixel_note(shards, cfg.data.eval_transform)):
        log.info(note)
    batches = data.evaluation(where)
    identity = f"{weights.resolve()} {weights.stat().st_mtime_ns} {config_hash(cfg)} {split}"
    how = Measuring(split, cfg.trainer.precision, out_dir / ".evaluation", identity, cfg.eval.cache_bytes)
    measured = evaluate(model, batches, world, how, predictions=True)
    metrics, skipped = measured.metrics, measured.skipped
    bad = f"{skipped.total()} of {batches.images} images are bad: {', '.join(sorted(skipped))}"
    if skipped.total() > cfg.data.max_bad_share * batches.images:
        raise DataError(f"{bad}; data.max_bad_share={cfg.data.max_bad_share}")
    if world.main:
        if skipped:
            log.warning(bad)
        out_dir.mkdir(parents=True, exist_ok=True)
        content = {
            "weights": str(weights.resolve()),
            "split": split,
            "overrides": [override.input_line for override in changes()],
            "metrics": metrics,
            **report.git_state(),
        }
        written = report.write_report(out_dir, content, f"evaluation-{split}.json")
        write_predictions(out_dir, split, model.objectives, measured)
        if metrics:
            print(table(list(metrics.items()), (f"{weights.parent.name} on {split}", "value")))
        else:
            log.info(f"{split} has no labels: its predictions are in {out_dir}")
        log.info(f"written: {written}")
    return metrics.get(cfg.task.metric.replace("/val/", f"/{split}/"))
