"""Evaluation of weights that exist already, on a split of their own or of other data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from bt.assemble import Data, build_model, tokenizer_of
from bt.config import Config, config_hash
from bt.config.record import read_recorded, to_config
from bt.config.schema import check_run, check_values
from bt.config.targets import check_model_targets
from bt.data.shards import ShardSet
from bt.data.text import make_tokenizer
from bt.engine import distributed, report
from bt.engine.distributed import World
from bt.engine.initial import load_weights, weights_file
from bt.engine.progress import table
from bt.errors import CheckpointError, ConfigError
from bt.run import measure, set_numerics, write_predictions

log = logging.getLogger("bt")

# Groups whose options set keys all over the configuration, which a finished run has already.
GLOBAL_GROUPS = ("experiment", "trainer", "sweep")


def evaluate_run(cfg: Config) -> float | None:
    """Evaluates cfg.run_dir's best checkpoint (or cfg.init_from) on cfg.split; returns the objective metric."""
    world = distributed.join(cfg.trainer.device)
    try:
        split, source = cfg.split, cfg.init_from or cfg.run_dir
        if not source:
            raise ConfigError("give run_dir=DIR of a trained run, or init_from=PATH with task and data")
        out_dir = Path(cfg.run_dir or f"evaluations/{cfg.name}-{config_hash(cfg)[:8]}").expanduser()
        if cfg.run_dir and not cfg.init_from:
            cfg = stored_config(cfg)
        return evaluate_weights(cfg, world, weights_file(source), split, out_dir)
    finally:
        distributed.leave()


def stored_config(cfg: Config) -> Config:
    """The configuration of cfg.run_dir with what the command line changes in it."""
    stored = OmegaConf.create(read_recorded(Path(cfg.run_dir).expanduser()))
    for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
        key = override.key_or_group.replace("/", ".")
        if key in GLOBAL_GROUPS:
            raise ConfigError(f"{key}={override.value()} does not go with run_dir: the run's own configuration holds")
        if key not in ("run_dir", "split"):
            OmegaConf.update(stored, key, select(cfg.recorded, key), merge=False)
    merged = to_config(OmegaConf.merge(OmegaConf.structured(Config), stored))
    check_values(merged)
    check_run(merged)
    check_model_targets(merged)
    return merged


def select(node: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        node = node[part]
    return node


def evaluate_weights(cfg: Config, world: World, weights: Path, split: str, out_dir: Path) -> float | None:
    set_numerics(cfg)
    shards = ShardSet(cfg.data.dir, split, cfg.data.cache_dir)
    if cfg.encoder.text["tokenizer"]["kind"] == "trained":
        tokenizer = tokenizer_of(weights)
    else:
        tokenizer = make_tokenizer(texts=(), **cfg.encoder.text["tokenizer"])
    model = build_model(cfg, tokenizer, shards.labels)
    loaded = load_weights(weights, model)
    if loaded.new:
        raise CheckpointError(f"{weights} has no trained head for {', '.join(loaded.new)}")
    model.to(world.device)
    metrics, predictions = measure(model, Data(cfg, world, model, tokenizer), world, split, cfg.trainer.precision)
    if world.main:
        out_dir.mkdir(parents=True, exist_ok=True)
        content = {"weights": str(weights.resolve()), "split": split, "metrics": metrics, **report.git_state()}
        written = report.write_report(out_dir, content, f"evaluation-{split}.json")
        write_predictions(out_dir / f"predictions-{split}.jsonl", predictions)
        print(table(list(metrics.items()), (f"{weights.parent.name} on {split}", "value")))
        log.info(f"written: {written}")
    return metrics.get(cfg.task.metric)
