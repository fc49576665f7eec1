"""The typed schema of a run: what each option is, its default and what values it takes.

conf/config.yaml and the groups beside it repeat every option with a comment; a test holds the two equal.
Nodes that build an object (`_target_` and its arguments) are open dictionaries here, because a typed node would
refuse a plug-in's own arguments; bt.config.targets checks them against the class's signature.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from bt.errors import ConfigError


def option(default: Any, **limits: Any) -> Any:
    """A field with limits: choices=[...], low= (at least), above= (more than), high= (at most), below= (less than)."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=limits)
    return field(default=default, metadata=limits)


# Options of the node `bridge` that hold for every bridge and are the tower's; the rest are its class's arguments.
BRIDGE_OPTIONS = ("sides", "uni_layers", "stop_gradient")


@dataclass
class EncoderConfig:
    vision: dict[str, Any] = option({})
    text: dict[str, Any] = option({})


@dataclass
class TaskConfig:
    texts: str | None = "captions"
    objectives: dict[str, Any] = option({})
    evaluators: dict[str, Any] = option({})
    batch_metrics: bool = True
    metric: str = MISSING
    mode: str = option("max", choices=["max", "min"])


@dataclass
class DataConfig:
    dir: Any = MISSING
    samples: Any = None
    train_split: Any = "train"
    val_split: Any = "val"
    test_split: Any = "test"
    weights: list[float] | None = option(None, above=0)
    texts_per_image: int | None = option(1, low=1)
    max_samples: int | None = option(None, low=1)
    fraction: float = option(1.0, above=0, high=1)
    order: str = option("global", choices=["global", "shards"])
    shuffle_shards: int = option(8, low=1)
    max_text_len: int = option(50, low=3)
    train_transform: str = "clip"
    eval_transform: str = "clip"
    randaug: str = option("official", choices=["official", "torchvision"])
    resize: str = option("pil", choices=["pil", "fast"])
    decode_draft: bool = False
    decode_on: str = option("cpu", choices=["cpu", "device"])
    workers: int = option(2, low=0)
    prefetch: int = option(4, low=1)
    on_bad_sample: str = option("fail", choices=["fail", "skip"])
    max_bad_share: float = option(0.01, low=0, high=1)
    cache_dir: str | None = None


@dataclass
class OptimizerConfig:
    lr: float = option(1e-5, above=0)
    cross_multiplier: float = option(5.0, low=0)
    head_multiplier: float = option(5.0, low=0)
    layer_decay: float = option(1.0, above=0, high=1)
    weight_decay: float = option(0.01, low=0)
    betas: list[float] = option([0.9, 0.98], low=0, below=1, length=2)
    eps: float = option(1e-8, above=0)
    groups: str = option("all_norms", choices=["all_norms", "official"])
    fused: bool = True
    warmup: int | float = option(0.1, low=0)
    decay: str = option("polynomial", choices=["polynomial", "cosine"])
    decay_power: float = option(1.0, above=0)
    end_lr: float = option(0.0, low=0)


@dataclass
class TrainerConfig:
    epochs: int | None = option(10, low=1)
    max_steps: int | None = option(None, low=1)
    micro_batch: int | None = option(None, low=1)
    precision: str = option("fp32", choices=["fp32", "bf16", "fp16"])
    grad_clip: float | None = option(None, above=0)
    gradient_checkpointing: str = option("none", choices=["none", "cheap", "full"])
    parallel: str = option("ddp", choices=["ddp", "fsdp"])
    timeout_minutes: float = option(30.0, above=0)
    matmul_precision: str = option("highest", choices=["highest", "high", "medium"])
    device: str = option("auto", choices=["auto", "cpu", "cuda"])
    threads: int | None = option(None, low=1)
    log_every: int = option(10, low=1)
    compile: bool = False
    profile: bool = False
    deterministic: bool = True


@dataclass
class CheckpointConfig:
    every_steps: int | None = option(None, low=1)
    every_minutes: float | None = option(15.0, above=0)
    keep: int = option(1, low=1)
    background: bool = True
    ignore_heads: bool = False
    encoders_only: bool = False


@dataclass
class EvalConfig:
    every_epochs: float | None = option(1.0, above=0)
    every_steps: int | None = option(None, low=1)
    batch: int = option(256, low=1)
    max_samples: int | None = option(None, low=1)
    patience: int | None = option(None, low=1)
    cache_bytes: int = option(4_000_000_000, low=0)
    test: bool = True


@dataclass
class TrackingConfig:
    kind: str = option("mlflow", choices=["mlflow", "none"])
    uri: str | None = None
    experiment: str = "bt"
    timeout_seconds: int = option(5, low=1)
    system_metrics: bool = False


@dataclass
class Config:
    """Root of a run's configuration, as `bt.train` gets it.

    recorded: the plain dictionary that is hashed and written to config.yaml. It is resolved except for values
    that come from the environment (`${oc.env:...}`), which may be secrets.
    """

    recorded: ClassVar[dict[str, Any] | None] = None

    name: str = "default"
    seed: int = option(0, low=0)
    run_dir: str | None = None
    init_from: str | None = None
    global_batch: int = option(256, low=1)
    plugins: list[str] = option([])
    debug: bool = False
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    bridge: dict[str, Any] = option({})
    cross: dict[str, Any] = option({})
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def check_values(node: Any, path: str = "") -> None:
    """Checks every field of a (nested) dataclass object against its limits; ConfigError names the key."""
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.")
        elif value is not None and not isinstance(value, dict):
            _check_field(key, value, item.metadata)


def _check_field(key: str, value: Any, limits: Any) -> None:
    if isinstance(value, list):
        if "length" in limits and len(value) != limits["length"]:
            raise ConfigError(f"{key} must have {limits['length']} values, got {value}")
        for entry in value:
            _check_field(key, entry, {k: v for k, v in limits.items() if k != "length"})
        return
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(f"{key}={value} is not one of: {', '.join(limits['choices'])}")
    bounds = [(k, limits[k]) for k in ("low", "above", "high", "below") if k in limits]
    if bounds and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{key}={value} must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} must be a finite number")
    holds = {
        "low": lambda v, b: v >= b,
        "above": lambda v, b: v > b,
        "high": lambda v, b: v <= b,
        "below": lambda v, b: v < b,
    }
    words = {"low": "at least", "above": "more than", "high": "at most", "below": "less than"}
    if any(not holds[kind](value, bound) for kind, bound in bounds):
        raise ConfigError(
            f"{key}={value} is out of range: must be "
            + " and ".join(f"{words[kind]} {bound}" for kind, bound in bounds)
        )


def _check_bridge(bridge: dict[str, Any]) -> None:
    sides, chosen, stop = (bridge.get(key) for key in BRIDGE_OPTIONS)
    if sides not in (None, "both", "text", "image"):
        raise ConfigError(f"bridge.sides={sides} is not one of: both, text, image")
    counted = isinstance(chosen, list) and chosen and all(type(layer) is int and layer < 0 for layer in chosen)
    if chosen not in (None, "top", "every_second", "last") and not counted:
        raise ConfigError(
            f"bridge.uni_layers={chosen} is not one of: top, every_second, last, or a list of layers counted from the "
            "top, as [-3,-2,-1]"
        )
    if stop not in (None, True, False):
        raise ConfigError(f"bridge.stop_gradient={stop} is not one of: true, false")


def check_run(cfg: Config) -> None:
    """What no single field can say: options that exclude or need each other."""
    _check_bridge(cfg.bridge)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cfg.name):
        raise ConfigError(f"name={cfg.name!r} names directories: use letters, digits, '.', '_' and '-' only")
    if cfg.data.dir is None:
        raise ConfigError("data.dir=null must be a directory or a list of directories (data.samples names none either)")
    dirs = cfg.data.dir if isinstance(cfg.data.dir, list) else [cfg.data.dir]
    if not dirs or not all(isinstance(entry, str) and entry for entry in dirs):
        raise ConfigError(f"data.dir={cfg.data.dir} must be a directory or a list of directories")
    for key in ("train_split", "val_split", "test_split"):
        splits = getattr(cfg.data, key)
        splits = splits if isinstance(splits, list) else [splits]
        if not splits or not all(isinstance(name, str) and name for name in splits):
            raise ConfigError(f"data.{key}={getattr(cfg.data, key)} must be a split or a list of splits")
    if cfg.data.decode_on == "device" and (cfg.data.resize != "fast" or cfg.data.decode_draft):
        raise ConfigError("data.decode_on=device needs data.resize=fast and data.decode_draft=false")
    if cfg.data.weights is not None and len(cfg.data.weights) != len(dirs):
        raise ConfigError(f"data.weights={cfg.data.weights} needs one weight for each of the {len(dirs)} in data.dir")
    if cfg.trainer.epochs is None and cfg.trainer.max_steps is None:
        raise ConfigError("trainer.epochs and trainer.max_steps are both null: one of them must be given")
    if cfg.trainer.compile and cfg.trainer.gradient_checkpointing == "cheap":
        raise ConfigError(
            "trainer.gradient_checkpointing=cheap does not go with trainer.compile=true: none or full does"
        )
    warmup = cfg.optimizer.warmup
    if isinstance(warmup, float) and warmup > 1:
        raise ConfigError(f"optimizer.warmup={warmup} is out of range: a fraction is at most 1 (an int counts steps)")
    if cfg.optimizer.end_lr > cfg.optimizer.lr:
        raise ConfigError(f"optimizer.end_lr={cfg.optimizer.end_lr} is out of range: must be at most optimizer.lr")
    if not cfg.task.objectives:
        raise ConfigError("task.objectives is empty: nothing would be trained")
    if not cfg.task.batch_metrics and not cfg.task.evaluators:
        raise ConfigError("task.batch_metrics=false without task.evaluators: nothing would be measured")
    measured = [*cfg.task.objectives] if cfg.task.batch_metrics else []
    if cfg.task.metric.split("/")[:2] not in [[name, "val"] for name in (*measured, *cfg.task.evaluators)]:
        allowed = ", ".join(f"{name}/val/..." for name in (*measured, *cfg.task.evaluators))
        raise ConfigError(
            f"task.metric={cfg.task.metric} is measured by no objective or evaluator: allowed are {allowed}"
        )
