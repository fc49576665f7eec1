"""Configuration: a typed schema, checks, and what of it is written down."""

from bt.config.entry import check_config, compose_run, entry, log_to_stdout, one_line
from bt.config.record import (
    config_hash,
    config_text,
    diff_configs,
    other_settings,
    prepare_run_dir,
    read_config,
    resolve_run_dir,
    resolve_sweep_dir,
    write_config,
)
from bt.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    OptimizerConfig,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "OptimizerConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainerConfig",
    "check_config",
    "compose_run",
    "config_hash",
    "config_text",
    "diff_configs",
    "entry",
    "log_to_stdout",
    "one_line",
    "other_settings",
    "prepare_run_dir",
    "read_config",
    "resolve_run_dir",
    "resolve_sweep_dir",
    "write_config",
]
