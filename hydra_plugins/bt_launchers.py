"""Hydra's launchers `slurm` and `local` (conf/hydra/launcher/): members as jobs, or as processes side by side.

Hydra looks for launchers in this package alone and imports all of it at every start, so the work is in `launchers`.
Annotations are not postponed here: Hydra runs the module before it is in sys.modules, where dataclasses look them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

try:
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititLauncher
except ImportError:  # the extra `slurm` is not installed: launchers.actions says so
    SlurmQueueConf, SubmititLauncher = object, Launcher


class _Members:
    """`launch` of both: what to do with the members (submit, wait, plan) is the command's choice."""

    kind: str

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from launchers import actions

        return actions.launch(self.kind, self.hydra_context, self.task_function, self.config, job_overrides)


class SlurmLauncher(_Members, SubmititLauncher):
    """Each member is one SLURM job of all its nodes and ranks, submitted by Submitit."""

    kind = "slurm"

    def __init__(self, **params: Any):
        self.params = params

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config


class LocalLauncher(_Members, Launcher):
    """Members are processes on this machine, a bounded number at a time."""

    kind = "local"

    def __init__(self, **params: Any):
        self.params = params

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config


@dataclass
class SlurmConf(SlurmQueueConf):
    """The keys of hydra-submitit-launcher."""

    _target_: str = "hydra_plugins.bt_launchers.SlurmLauncher"
    tasks_per_node: int | None = None  # processes per node; null: one per GPU


@dataclass
class LocalConf:
    """max_parallel: members at a time. gpus_per_member: each on GPUs of its own."""

    _target_: str = "hydra_plugins.bt_launchers.LocalLauncher"
    max_parallel: int | None = None
    gpus_per_member: int = 1


ConfigStore.instance().store(group="hydra/launcher", name="bt_slurm", node=SlurmConf, provider="bt")
ConfigStore.instance().store(group="hydra/launcher", name="bt_local", node=LocalConf, provider="bt")
