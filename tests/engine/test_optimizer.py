"""Parameter groups, schedule and steps of the optimizer against the released code's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bt.config import OptimizerConfig
from bt.data.batch import Batch
from bt.engine.optimizer import build_optimizer, make_schedule, undecayed
from bt.interop.official import to_official
from bt.tasks.base import Context, TaskModel
from bt.tasks.irtr import IRTR
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM
from bt.tasks.itm_itc import HardITM
from bt.tasks.mlm import MLM
from bt.tasks.nlvr2 import NLVR2
from bt.tasks.snli_ve import SNLIVE
from bt.tasks.vqa import VQA
from tests.golden_helpers import (
    ANSWERS,
    CONTRASTIVE,
    PROJECTION_FREQUENCIES,
    VOCABULARY,
    WIDTH,
    golden_batch,
    golden_texts,
    golden_tower,
    key_bias_free,
    load_golden,
    table,
    tensors,
)

# Registered by the released code for every task, used by none or only by another objective.
ELSEWHERE = {
    "text_transformer.pooler.dense.bias",
    "text_transformer.pooler.dense.weight",
    "vit_model.ln_final.bias",
    "vit_model.ln_final.weight",
    "vit_model.positional_embedding",
}
OBJECTIVES = {
    "mlm": MLM,
    "itm": ITM,
    "itc": lambda context: ITC(context, size=CONTRASTIVE),
    "vqa": lambda context: VQA(context, hidden_scale=2),
    "snli_ve": SNLIVE,
    "nlvr2": NLVR2,
    "irtr": IRTR,
    "hard": HardITM,
    "frozen": lambda context: ITM(context, frozen_head=True),
}
OFFICIAL = {
    "vqa": ["vqa"],
    "snli": ["snli_ve"],
    "nlvr2": ["nlvr2"],
    "pretrain_mlm_itm": ["mlm", "itm"],
    "pretrain_mlm_itm_itc": ["mlm", "itm", "itc"],
    "pretrain_mlm_itm_itc_hard": ["mlm", "itc", "hard"],
    "irtr": ["irtr", "frozen"],
    "irtr_itm_itc": ["itc", "hard"],
}
METER = "pretrain_mlm_itm"


def golden_model(*names: str, bridge: str = "add") -> TaskModel:
    tokenizer = SimpleNamespace(vocab_size=VOCABULARY, mask_id=4, special_ids=[0, 1, 2, 3, 4])
    labels = {"answers": [str(answer) for answer in range(ANSWERS)], "classes": ["no", "perhaps", "yes"]}
    context = Context(WIDTH, WIDTH, WIDTH, tokenizer, labels)
    made = {name: OBJECTIVES[name](context) for name in names}
    named = {"itm" if name in ("hard", "frozen") else name: objective for name, objective in made.items()}
    return TaskModel(golden_tower(bridge), named)


@pytest.mark.parametrize("folder, task", [*(("bridgetower/optimizer", t) for t in OFFICIAL), ("meter", METER)])
def test_groups_are_the_released_ones_by_name(folder, task):
    golden = table(f"{folder}/groups_{task}")
    cfg = OptimizerConfig(
        lr=1.0,
        weight_decay=1.0,
        groups="official",
        head_multiplier=golden["lr_mult_head"],
        cross_multiplier=golden["lr_mult_cross_modal"],
    )
    model = golden_model(*OFFICIAL[task], bridge="none" if folder == "meter" else "add")
    optimizer = build_optimizer(model, cfg)
    # Each parameter filled with its rate (negative: without decay), so that the split of fused maps is checked too.
    filled = {
        name: torch.full_like(parameter, group["lr"] if group["weight_decay"] else -group["lr"])
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    found = {name: [abs(t.unique().item()), t.unique().item() > 0] for name, t in to_official(filled).items()}
    elsewhere = ELSEWHERE | (set() if "itc" in OFFICIAL[task] else {"temperature"})
    if "frozen" in OFFICIAL[task]:  # in a group there, but without a gradient it is neither moved nor decayed
        elsewhere |= {"itm_score.fc.weight", "itm_score.fc.bias"}
    assert found == {name: value for name, value in golden["params"].items() if name not in elsewhere}
    roles = ["base", "cross"] if task == "irtr" else ["base", "head", "cross"]  # its head trains at the base rate
    assert sorted((g["role"], g["weight_decay"]) for g in optimizer.param_groups) == sorted(
        (role, decay) for role in roles for decay in (0.0, 1.0)
    )


def test_by_default_every_norm_and_bias_is_exempt_and_nothing_else():
    model = golden_model("vqa", "mlm")
    norms = {
        f"{path}.{own}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters()
    }
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert undecayed(model, "all_norms") == norms | biases
    released = undecayed(model, "all_norms") - undecayed(model, "official")
    # CLIP: ln_pre, ln_post and two a block; and the norm in the VQA head.
    assert len(released) == 2 + 2 * 4 + 1
    assert all(name.startswith("tower.vision.visual.") for name in released - {"objectives.vqa.head.1.weight"})


def test_frozen_parameters_are_in_no_group():
    model = golden_model("vqa")
    model.tower.vision.requires_grad_(False)
    names = {name for group in build_optimizer(model, OptimizerConfig()).param_groups for name in group["param_names"]}
    assert names == {name for name, p in model.named_parameters() if not name.startswith("tower.vision.")}


def test_schedule():
    cases = table("bridgetower/optimizer/schedule")
    assert len(cases) >= 6
    for case in cases:
        cosine = case["decay_power"] == "cosine"
        cfg = OptimizerConfig(
            lr=case["base_lr"],
            end_lr=case["end_lr"],
            warmup=case["warmup_steps"],
            decay="cosine" if cosine else "polynomial",
            decay_power=1.0 if cosine else case["decay_power"],
        )
        schedule = make_schedule(cfg, case["total_steps"])
        for step, factor in enumerate(case["factor"]):
            assert schedule(step) == pytest.approx(factor, abs=1e-12), (case, step)


@pytest.mark.parametrize("case", ["vqa_3steps_constant_lr", "vqa_3steps_scheduled"])
def test_three_steps_of_adamw(case):
    """Tolerances: tests/golden/README.md. In double precision, because AdamW makes whole steps of gradients that are
    rounding alone: what is measured is the fixtures' rounding, not this processor's beside it."""
    golden = table(f"bridgetower/optimizer/{case}")
    rounding = table(f"bridgetower/optimizer/{case}_rounding")
    deltas = tensors(f"bridgetower/optimizer/{case}_delta")
    model = load_golden(golden_model("vqa")).double()
    cfg = OptimizerConfig(lr=1e-3, weight_decay=0.01, groups="official", warmup=0.1)
    optimizer = build_optimizer(model, cfg)
    schedule = make_schedule(cfg, 20) if case.endswith("scheduled") else lambda step: 1.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = golden_batch()
    pairs = torch.arange(4)[:, None].expand(-1, 2)
    ids = torch.arange(4)
    targets = {"vqa": {"scores": batch["vqa_targets"].double(), "answered": torch.ones(4, dtype=torch.bool)}}
    inputs = Batch(batch["image"].double(), golden_texts(batch), pairs, ids, ids, targets)

    def mean_loss():
        return model(inputs)["vqa"].loss / 4

    losses = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step)
        loss = mean_loss()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    losses.append(mean_loss().item())
    assert losses == pytest.approx(golden["losses_before_each_step_and_after"], rel=1e-4)
    moved = to_official({name: p.detach() - before[name] for name, p in model.named_parameters()})
    assert moved.keys() | set(rounding["no_gradient"]) == golden["delta"].keys()
    compared = 0
    for name, delta in moved.items():
        entry, noisy = golden["delta"][name], name in rounding["change_when_rows_are_reversed"]
        if name.endswith(".key.bias") or name.endswith("in_proj_bias"):
            continue
        assert delta.norm().item() == pytest.approx(entry["norm"], rel=3e-5), name
        if not noisy:
            flat = key_bias_free(name, delta)[0]
            sample = flat if flat.numel() <= 1024 else flat[(torch.arange(256) * 7919 + 13) % flat.numel()]
            assert (sample - deltas[name].reshape(-1)).abs().max().item() <= 2e-5, name
            index = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
            waves = [(flat.double() * torch.cos(index * f)).sum().item() for f in PROJECTION_FREQUENCIES]
            assert waves == pytest.approx(entry["proj"], abs=1e-3 * entry["norm"]), name
            compared += 1
    assert compared >= 180


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_loss_scaler_makes_void_does_not_count(fused):
    """Two optimizers take the same good steps, one of them a void one before each."""
    plain, scaled = golden_model("vqa"), golden_model("vqa")
    scaled.load_state_dict(plain.state_dict())
    cfg = OptimizerConfig(lr=1e-3, fused=fused)
    optimizers = build_optimizer(plain, cfg), build_optimizer(scaled, cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def gradients(model: TaskModel, value: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)

    for step in (1, 2):
        gradients(plain, 0.25)
        optimizers[0].step()
        for value in (float("inf"), 0.25 * scaler.get_scale() / 2):  # halved by the void step
            scaler.scale(torch.ones(()))
            gradients(scaled, value)
            scaler.step(optimizers[1])
            scaler.update()
        assert [{group["steps"] for group in o.param_groups} for o in optimizers] == [{step}, {step}]
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, scaled.get_parameter(name)), name
