"""AdamW with the recipe's six parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bt.config import OptimizerConfig

ROLES = ("base", "head", "cross")
# The released group builder exempts norms by these endings of their names (official meter_utils.set_schedule), so
# CLIP's ln_1, ln_2, ln_pre and ln_post are decayed, and so are norms that are a number in a list there: the attribute
# `officially_decayed` of the module that holds them names these.
OFFICIAL_NORM = re.compile(r"(LayerNorm|norm|norm1|norm2)$")


class AdamW(torch.optim.AdamW):
    """torch's AdamW, told to do what the AdamW of the released recipes does (transformers 4.17).

    Theirs adds epsilon to the root of the second moment before the bias correction, torch's after it, so epsilon is
    divided by sqrt(1 - beta2^t): with beta2 = 0.98 a factor of 7 at the first step and 1.07 at the hundredth, which
    moves parameters with tiny gradients. Theirs decays after the update, p <- (p - lr u)(1 - lr d); torch's before,
    p <- p (1 - lr d) - lr u: the same with lr (1 - lr d) and d / (1 - lr d). Groups keep the values of the
    configuration between steps, and count t as `steps`, on the host; a step that the loss scaler makes void (its
    gradients were not finite) does not count, as in torch.
    """

    def __init__(self, groups: list[dict[str, Any]], *, eps: float, **options: Any):
        super().__init__([{"steps": 0, **group} for group in groups], eps=eps, **options)
        self.register_step_pre_hook(AdamW._as_released)
        self.register_step_post_hook(AdamW._as_configured)

    @staticmethod
    def _as_released(optimizer: AdamW, arguments: Any, keywords: Any) -> None:
        for group in optimizer.param_groups:
            group["steps"] += 1
            group["configured"] = {key: group[key] for key in ("lr", "weight_decay", "eps")}
            shrink = 1 - group["lr"] * group["weight_decay"]
            group["lr"] *= shrink
            group["weight_decay"] /= shrink
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** group["steps"])

    @staticmethod
    def _as_configured(optimizer: AdamW, arguments: Any, keywords: Any) -> None:
        # Set by GradScaler around the step of a fused optimizer, which then leaves everything as it was.
        void = bool(getattr(optimizer, "found_inf", False))
        for group in optimizer.param_groups:
            group.update(group.pop("configured"))
            group["steps"] -= void


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> AdamW:
    """AdamW over the parameter groups of `model` (bt.tasks.base.TaskModel).

    Every group also holds `role`, `peak_lr` (what the schedule's factor is applied to) and, by torch, `param_names`.
    """
    return AdamW(parameter_groups(model, cfg), lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=cfg.fused)


def parameter_groups(model: nn.Module, cfg: OptimizerConfig) -> list[dict[str, Any]]:
    """{base, head, cross} x {decay, no decay}, empty ones left out; `params` are (name, parameter) pairs.

    With cfg.layer_decay below 1 there is a group for each encoder layer, the lowest first. Parameters that are frozen
    are in no group. Sharded ones and whole ones, which torch does not update together, are in groups of their own.
    """
    rate = {"base": cfg.lr, "head": cfg.lr * cfg.head_multiplier, "cross": cfg.lr * cfg.cross_multiplier}
    exempt = undecayed(model, cfg.groups)
    groups: dict[tuple[str, int, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            above = model.layers_above(name) if cfg.layer_decay < 1 else 0
            key = model.parameter_role(name), above, name not in exempt, isinstance(parameter, DTensor)
            groups.setdefault(key, []).append((name, parameter))
    ordered = sorted(groups, key=lambda key: (ROLES.index(key[0]), -key[1], not key[2], not key[3]))
    return [
        {
            "params": groups[role, above, decay, sharded],
            "role": role,
            "lr": rate[role] * cfg.layer_decay**above,
            "peak_lr": rate[role] * cfg.layer_decay**above,
            "weight_decay": cfg.weight_decay if decay else 0.0,
        }
        for role, above, decay, sharded in ordered
    ]


def undecayed(model: nn.Module, rule: str) -> set[str]:
    """Names of the parameters without weight decay: biases, and the norms that `rule` exempts.

    rule: "all_norms", or "official" for the released code's choice.
    """
    missed = {
        f"{path}.{norm}" for path, module in model.named_modules() for norm in getattr(module, "officially_decayed", ())
    }
    exempt: set[str] = set()
    for path, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if "bias" in own or (_is_norm(module) and (rule == "all_norms" or _officially_exempt(path, missed))):
                exempt.add(name)
    return exempt


def _is_norm(module: nn.Module) -> bool:
    """By class name, because libraries bring norms of their own (LayerNormFp32, LayerNorm2d, RMSNorm, ...)."""
    return any("Norm" in cls.__name__ for cls in type(module).__mro__)


def _officially_exempt(path: str, missed: set[str]) -> bool:
    return OFFICIAL_NORM.search(path) is not None if path.startswith("tower.vision.") else path not in missed


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """step -> factor on every group's peak learning rate; step 0 is the first optimizer step.

    All groups share one factor, so that an end rate is scaled by the multipliers too, as in the official code.
    """
    warmup = int(total_steps * cfg.warmup) if isinstance(cfg.warmup, float) else cfg.warmup
    return Schedule(total_steps, warmup, cfg.decay, cfg.decay_power, cfg.end_lr / cfg.lr)


class Schedule:
    """Linear warm-up from 0, then polynomial decay to `end` at `total` or a half cosine to 0 (HF's two schedules)."""

    def __init__(self, total: int, warmup: int, decay: str, power: float, end: float):
        self.total, self.warmup, self.decay, self.power, self.end = total, warmup, decay, power, end

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return step / max(1, self.warmup)
        if self.decay == "cosine":
            progress = (step - self.warmup) / max(1, self.total - self.warmup)
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        if step > self.total:
            return self.end
        remaining = 1 - (step - self.warmup) / max(1, self.total - self.warmup)
        return (1 - self.end) * remaining**self.power + self.end
