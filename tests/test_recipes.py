"""Every recipe of conf/experiment/ against the official scripts' numbers, written down here from the official code.

What stands in the tables is what took effect there: sacred's named configurations, then the command line; loss weights
are on or off. Rates are absolute peaks, lengths in epochs or steps, images in pixels. A change of a shared default that
moves a recipe fails here, by experiment and key.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from bt.assemble import build_model, micro_batches
from bt.config import Config, compose_run
from bt.data.sources.glue import TASKS
from bt.data.text import make_tokenizer
from bt.engine.optimizer import parameter_groups
from bt.errors import ConfigError
from bt.smoke import all_experiments

# The demo's and other experiments of our own: no official script to compare with.
OWN = {"easy_vqa", "easy_vqa_pretrain", "ablation_encoders", "ablation"}

# Equal in all official runs, BridgeTower's, METER's, ManagerTower's and the uni-modal ones.
ALWAYS = {
    "seed": 0,
    "precision": "fp32",
    "grad_clip": None,
    "betas": [0.9, 0.98],
    "decay": ("polynomial", 1.0),
    "end_lr": 0.0,
    "groups": "official",
    "layer_decay": 1.0,
    "freeze": ("none", "none"),
    "randaug": "official",
    "resize": "pil",
    "order": "global",
    "fraction": 1.0,
    "weights": None,
    "cross_layers": 6,
    "ffn_ratio": 4.0,
    "cross_dropout": 0.1,
    "cross_eps": 1e-12,
    "cross_norm": "post",
    "init_std": 0.02,
    "text_dropout": None,  # RoBERTa's own 0.1
    "weight_of_losses": 1.0,
    "uni_layers": "top",
    "sides": "both",
    "patience": None,
    "every_epochs": 1.0,
    "eps": 1e-8,
    "vision_layers_removed": 0,
    "bridge": "AddBridge",
    "bridge_eps": 1e-5,
    "managers": None,
    "texts_per_image": 1,
    "test": True,
}
BASE = {
    "vision": ("ViT-B-16-quickgelu", "openai"),
    "text": ("FacebookAI/roberta-base", True),
    "tokenizer": ("pretrained", "FacebookAI/roberta-base"),
    "cross": (768, 12),
}
LARGE = {
    "vision": ("ViT-L-14-quickgelu", "openai"),
    "text": ("FacebookAI/roberta-large", True),
    "tokenizer": ("pretrained", "FacebookAI/roberta-large"),
    "cross": (1024, 16),
}
PRETRAIN = {
    "data": ["data/coco_karpathy", "data/visual_genome", "data/sbu", "data/cc3m"],
    "splits": (["train", "restval"], "val", "test"),
    "transforms": ("clip", "clip"),
    "text_len": 50,
    "lr": (1e-5, 5e-5, 5e-5),
    "batch": 4096,
    "epochs": None,
    "steps": 100_000,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "losses": ["itm", "mlm"],
    "mlm": (0.15, "token", 1e-12),
    "itm_negatives": "sampled",  # draw_false_image 1
    "metric": "itm/val/accuracy",
    "test": False,
}
VQA = {
    "data": "data/vqav2",
    "texts_per_image": None,  # all questions of an image in one batch; the released code draws each by itself
    "splits": (["train", "val"], "val", "test-dev"),
    "text_len": 50,
    "batch": 512,
    "epochs": 10,
    "steps": None,
    "losses": ["vqa"],
    "head_layers": 2,
    "metric": "vqa/val/score",
}
FLICKR = {"data": "data/flickr30k_karpathy", "splits": ("train", "val", "test"), "text_len": 40}
COCO = {"data": "data/coco_karpathy", "splits": (["train", "restval"], "val", "test"), "text_len": 40}
ITM = {
    "losses": ["irtr", "itm"],  # nominally 1 and 0.5
    "false_texts": (15, "other"),
    "itm_negatives": "sampled",
    "itm_head_frozen": True,
    "metric": "irtr/val/loss",
    "ranker": "irtr",
    "k_test": None,
    "steps": None,
}
ITM_ITC = {
    "losses": ["itc", "itm"],
    "itm_negatives": "local",  # gather_global_negative False
    "contrast": (256, 0.07, "image"),
    "metric": "retrieval/val/r_mean",
    "ranker": "itm",
    "steps": None,
}
SNLI_VE = {
    "data": "data/snli_ve",
    "splits": ("train", "dev", "test"),
    "text_len": 50,
    "losses": ["snli_ve"],
    "head_layers": 2,
    "metric": "snli_ve/val/accuracy",
    "steps": None,
}
NLVR2 = {
    "data": "data/nlvr2",
    "splits": ("train", "dev", "test1"),
    "text_len": 50,
    "losses": ["nlvr2"],
    "head_layers": 2,
    "metric": "nlvr2/val/accuracy",
    "steps": None,
}
CIFAR = {
    "splits": ("train", "test", "test"),
    "image": (224, 197),
    "transforms": ("clip", "clip"),
    "text_len": 50,
    "lr": (1e-5, 5e-5, 1e-5),  # there is nothing at the second
    "batch": 512,
    "micro_batch": (64, 8, 1),
    "eval_batch": 256,
    "epochs": 10,
    "steps": None,
    "warmup": 0.06,
    "weight_decay": 0.01,
    "losses": ["cifar"],
    "cifar_head": "trained",
    "metric": "cifar/val/accuracy",
    "test": False,
}
GLUE = {
    "splits": ("train", "dev", "test"),
    "image": (288, 325),  # no image is read
    "transforms": ("clip", "clip"),
    "text_len": 512,
    "lr": (1e-5, 5e-5, 1e-5),  # there is nothing at the second
    "batch": 16,
    "micro_batch": (32, 1, 1),
    "eval_batch": 128,
    "epochs": 10,
    "steps": None,
    "warmup": 0.06,
    "weight_decay": 0.1,
    "eps": 1e-6,
    "losses": ["glue"],
    "head_dropout": 0.1,
    "metric": "glue/val/score",
    "patience": 3,
}
METER = {"bridge": "NoBridge", "bridge_eps": None, "vision_layers_removed": 1}
MANAGERS = ("kind", "managed", "weights", "temperature", "noise")
MANAGERTOWER = {"bridge": "ManagerBridge", "managers": ("adaptive", 6, "vector", 1.0, True)}
METER_TRANSFORMS = {"transforms": ("clip_randaug", "clip"), "warmup": 0.1, "weight_decay": 0.01}

# micro_batch: pairs on a GPU, GPUs on all nodes, micro-batches accumulated; image: pixels, tokens.
EXPECTED: dict[str, dict[str, Any]] = {
    "pretrain_base": {**BASE, **PRETRAIN, "image": (288, 325), "micro_batch": (32, 64, 2), "eval_batch": 128},
    "pretrain_large": {**LARGE, **PRETRAIN, "image": (294, 442), "micro_batch": (16, 64, 4), "eval_batch": 64},
    "vqa_base_scratch": {
        **BASE, **VQA, "image": (576, 1297), "transforms": ("clip_randaug", "clip"), "lr": (2e-5, 1e-4, 1e-3),
        "micro_batch": (16, 8, 4), "eval_batch": 64, "warmup": 0.1, "weight_decay": 0.01, "head_hidden": 1536,
    },
    "vqa_large_scratch": {
        **LARGE, **VQA, "image": (574, 1682), "transforms": ("clip_randaug", "clip"), "lr": (1e-5, 5e-5, 5e-4),
        "micro_batch": (4, 8, 16), "eval_batch": 16, "warmup": 0.1, "weight_decay": 0.01, "head_hidden": 2048,
    },
    "vqa_base": {
        **BASE, **VQA, "image": (576, 1297), "transforms": ("blip_randaug_wohf", "blip"), "lr": (1e-5, 5e-5, 5e-4),
        "micro_batch": (16, 8, 4), "eval_batch": 64, "warmup": 0.06, "weight_decay": 0.05, "head_hidden": 3072,
    },
    "vqa_base_vgqa": {
        **BASE, **VQA, "image": (576, 1297), "transforms": ("blip_randaug_wohf", "blip"), "lr": (1e-5, 5e-5, 5e-4),
        "micro_batch": (16, 8, 4), "eval_batch": 64, "warmup": 0.06, "weight_decay": 0.05, "head_hidden": 3072,
        "data": ["data/vqav2", "data/vgqa"],
    },
    "vqa_large": {
        **LARGE, **VQA, "image": (574, 1682), "transforms": ("blip_randaug_wohf", "blip"), "lr": (4e-6, 2e-5, 2e-4),
        "micro_batch": (4, 8, 16), "eval_batch": 16, "warmup": 0.06, "weight_decay": 0.05, "head_hidden": 4096,
    },
    "retrieval_flickr_itm": {
        **BASE, **FLICKR, **ITM, "image": (384, 577), "transforms": ("blip_randaug_wc", "blip"),
        "lr": (1.1e-5, 5.5e-5, 5.5e-5), "batch": 2048, "micro_batch": (4, 8, 64), "eval_batch": 16, "epochs": 20,
        "warmup": 0.1, "weight_decay": 0.01,
    },
    "retrieval_coco_itm": {  # a named configuration without a script, which has no micro-batch
        **BASE, **COCO, **ITM, "image": (384, 577), "transforms": ("clip", "clip"),
        "lr": (5e-6, 2.5e-5, 2.5e-5), "batch": 512, "micro_batch": (4, 8, 16), "eval_batch": 16, "epochs": 10,
        "warmup": 0.1, "weight_decay": 0.01,
    },
    "retrieval_flickr_itm_itc": {
        **BASE, **FLICKR, **ITM_ITC, "image": (384, 577), "transforms": ("blip_randaug_wc", "blip"),
        "lr": (5e-6, 2.5e-5, 2.5e-5), "batch": 512, "micro_batch": (8, 8, 8), "eval_batch": 8, "epochs": 20,
        "warmup": 0.05, "weight_decay": 0.01, "k_test": 128,
    },
    "retrieval_coco_itm_itc": {
        **BASE, **COCO, **ITM_ITC, "image": (384, 577), "transforms": ("blip_randaug_wc", "blip"),
        "lr": (4.5e-6, 2.25e-5, 2.25e-5), "batch": 256, "micro_batch": (16, 8, 2), "eval_batch": 16, "epochs": 30,
        "warmup": 0.1, "weight_decay": 0.01, "k_test": 256,
    },
    "snli_ve_base": {
        **BASE, **SNLI_VE, "image": (384, 577), "transforms": ("blip_randaug_wc", "blip"), "lr": (3e-6, 1.5e-5, 3e-5),
        "batch": 64, "micro_batch": (8, 8, 1), "eval_batch": 64, "epochs": 5, "warmup": 0.06, "weight_decay": 0.01,
        "head_hidden": 3072,
    },
    "nlvr2_base": {
        **BASE, **NLVR2, "image": (384, 577), "transforms": ("blip_randaug_wc", "blip"), "lr": (5e-6, 2.5e-5, 5e-5),
        "batch": 64, "micro_batch": (8, 8, 1), "eval_batch": 32, "epochs": 10, "warmup": 0.1, "weight_decay": 0.008,
        "head_hidden": 2304, "head_dropout": 0.1,
    },
    "contrastive_large": {  # transformers' class has no recipe: ours, of retrieval_coco_itm_itc and pretrain_large
        **LARGE, **COCO, "image": (294, 442), "transforms": ("blip_randaug_wc", "blip"),
        "lr": (4.5e-6, 2.25e-5, 2.25e-5), "batch": 256, "micro_batch": (32, 8, 1), "eval_batch": 64, "epochs": 10,
        "steps": None, "warmup": 0.1, "weight_decay": 0.01, "losses": ["contrastive"], "contrast": (512, 0.07, None),
        "metric": "retrieval/val/r_mean", "ranker": None, "k_test": None,
    },
    "cifar10": {**BASE, **CIFAR, "data": "data/cifar10"},
    "cifar100": {**BASE, **CIFAR, "data": "data/cifar100"},
    "meter_pretrain": {
        **BASE, **PRETRAIN, **METER, "image": (288, 325), "micro_batch": (32, 8, 16), "eval_batch": 32,
        "mlm": (0.15, "meter", 1e-12),
    },
    "meter_vqa": {
        **BASE, **VQA, **METER, **METER_TRANSFORMS, "image": (576, 1297), "lr": (5e-6, 2.5e-5, 2.5e-4),
        "micro_batch": (32, 8, 2), "eval_batch": 32, "head_hidden": 1536, "every_epochs": 0.1,
    },
    "meter_nlvr2": {
        **BASE, **NLVR2, **METER, **METER_TRANSFORMS, "image": (288, 325), "lr": (1e-5, 5e-5, 1e-4), "batch": 256,
        "micro_batch": (32, 8, 1), "eval_batch": 32, "epochs": 10, "head_hidden": 1536, "head_dropout": 0,
    },
    "meter_snli_ve": {
        **BASE, **SNLI_VE, **METER, **METER_TRANSFORMS, "image": (384, 577), "lr": (2e-6, 1e-5, 2e-5), "batch": 64,
        "micro_batch": (8, 8, 1), "eval_batch": 8, "epochs": 5, "head_hidden": 1536,
    },
    "meter_retrieval_flickr": {
        **BASE, **FLICKR, **ITM, **METER, **METER_TRANSFORMS, "image": (384, 577), "lr": (5e-6, 2.5e-5, 2.5e-5),
        "batch": 512, "micro_batch": (32, 8, 2), "eval_batch": 32, "epochs": 10,
    },
    "meter_retrieval_coco": {
        **BASE, **COCO, **ITM, **METER, **METER_TRANSFORMS, "image": (384, 577), "lr": (5e-6, 2.5e-5, 2.5e-5),
        "batch": 512, "micro_batch": (32, 8, 2), "eval_batch": 32, "epochs": 10,
    },
    "managertower_pretrain": {
        **BASE, **PRETRAIN, **MANAGERTOWER, "image": (288, 325), "micro_batch": (8, 64, 8), "eval_batch": 32,
    },
    "managertower_vqa_scratch": {
        **BASE, **VQA, **MANAGERTOWER, "image": (576, 1297), "transforms": ("albef_randaug_wohf", "albef"),
        "lr": (2e-5, 1e-4, 1e-3), "micro_batch": (4, 8, 16), "eval_batch": 16, "warmup": 0.1, "weight_decay": 0.01,
        "head_hidden": 1536,
    },
    "managertower_vqa": {  # the script's batch of 504 is rounded down to a multiple of 4 x 8
        **BASE, **VQA, **MANAGERTOWER, "image": (576, 1297), "transforms": ("albef_randaug_wohf", "albef"),
        "lr": (9e-6, 4.5e-5, 4.5e-4), "batch": 480, "micro_batch": (4, 8, 15), "eval_batch": 16, "warmup": 0.1,
        "weight_decay": 0.06, "head_hidden": 3072,
    },
    "managertower_snli_ve": {
        **BASE, **SNLI_VE, **MANAGERTOWER, "image": (384, 577), "transforms": ("albef_randaug_wc", "albef"),
        "lr": (3e-6, 1.5e-5, 3e-5), "batch": 64, "micro_batch": (8, 8, 1), "eval_batch": 64, "epochs": 4,
        "warmup": 0.06, "weight_decay": 0.01, "head_hidden": 3072,
    },
    "managertower_nlvr2": {
        **BASE, **NLVR2, **MANAGERTOWER, "image": (384, 577), "transforms": ("albef_randaug_wc", "albef"),
        "lr": (1.4e-5, 7e-5, 1.4e-4), "batch": 256, "micro_batch": (4, 8, 8), "eval_batch": 32, "epochs": 5,
        "warmup": 0.1, "weight_decay": 0.01, "head_hidden": 1536, "head_dropout": 0,
    },
    "managertower_retrieval_flickr": {
        **BASE, **FLICKR, **ITM_ITC, **MANAGERTOWER, "image": (384, 577), "transforms": ("albef_randaug_wc", "albef"),
        "lr": (6e-6, 3e-5, 3e-5), "batch": 512, "micro_batch": (8, 8, 8), "eval_batch": 8, "epochs": 20,
        "warmup": 0.1, "weight_decay": 0.01, "itm_negatives": "global", "k_test": 128,
    },
    "meter_cifar10": {**BASE, **CIFAR, **METER, "data": "data/cifar10"},
    "meter_cifar100": {**BASE, **CIFAR, **METER, "data": "data/cifar100"},
}  # fmt: skip
for _task in ("cola", "mrpc", "sst2", "qqp", "stsb", "rte", "qnli", "mnli"):
    EXPECTED[f"glue_{_task}"] = {**BASE, **GLUE, "data": f"data/glue_{_task}", "glue_task": _task}
    EXPECTED[f"meter_glue_{_task}"] = {**EXPECTED[f"glue_{_task}"], **METER}
for _name in ("glue_mnli", "meter_glue_mnli"):
    _dev, _test = ["dev_matched", "dev_mismatched"], ["test_matched", "test_mismatched"]
    EXPECTED[_name] |= {"splits": ("train", _dev, _test)}


@functools.cache
def recipe(name: str) -> Config:
    return compose_run(f"experiment={name}")


def found(cfg: Config, gpus: int) -> dict[str, Any]:
    """The configuration in the words of the tables. gpus: what the official run had, for the accumulation."""
    vision, text, optimizer, data = cfg.encoder.vision, cfg.encoder.text, cfg.optimizer, cfg.data
    patch = int(vision["name"].split("-")[2])
    return {
        "seed": cfg.seed,
        "vision": (vision["name"], vision["pretrained"]),
        "vision_layers_removed": vision["remove_last_layers"],
        "image": (vision["image_size"], (vision["image_size"] // patch) ** 2 + 1),
        "text": (text["name"], text["pretrained"]),
        "text_dropout": text["dropout"],
        "tokenizer": (text["tokenizer"]["kind"], text["tokenizer"]["name"]),
        "freeze": (vision["freeze"], text["freeze"]),
        "bridge": cfg.bridge["_target_"].rpartition(".")[2],
        "bridge_eps": cfg.bridge.get("norm_eps"),
        "managers": tuple(cfg.bridge[key] for key in MANAGERS) if "managed" in cfg.bridge else None,
        "uni_layers": cfg.bridge["uni_layers"],
        "sides": cfg.bridge["sides"],
        "cross": (cfg.cross["width"], cfg.cross["heads"]),
        "cross_layers": cfg.cross["layers"],
        "ffn_ratio": cfg.cross["ffn_ratio"],
        "cross_dropout": cfg.cross["dropout"],
        "cross_eps": cfg.cross["norm_eps"],
        "cross_norm": cfg.cross["norm"],
        "init_std": cfg.cross["init_std"],
        "data": data.dir,
        "splits": (data.train_split, data.val_split, data.test_split),
        "transforms": (data.train_transform, data.eval_transform),
        "randaug": data.randaug,
        "resize": data.resize,
        "order": data.order,
        "fraction": data.fraction,
        "weights": data.weights,
        "texts_per_image": data.texts_per_image,
        "text_len": data.max_text_len,
        "lr": (optimizer.lr, optimizer.lr * optimizer.cross_multiplier, optimizer.lr * optimizer.head_multiplier),
        "weight_decay": optimizer.weight_decay,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "groups": optimizer.groups,
        "layer_decay": optimizer.layer_decay,
        "warmup": optimizer.warmup,
        "decay": (optimizer.decay, optimizer.decay_power),
        "end_lr": optimizer.end_lr,
        "batch": cfg.global_batch,
        "micro_batch": (
            cfg.trainer.micro_batch,
            gpus,
            micro_batches(cfg.global_batch, gpus, cfg.trainer.micro_batch),
        ),
        "epochs": cfg.trainer.epochs,
        "steps": cfg.trainer.max_steps,
        "precision": cfg.trainer.precision,
        "grad_clip": cfg.trainer.grad_clip,
        "eval_batch": cfg.eval.batch,
        "every_epochs": cfg.eval.every_epochs,
        "patience": cfg.eval.patience,
        "test": cfg.eval.test,
        **of_the_task(cfg),
    }


def of_the_task(cfg: Config) -> dict[str, Any]:
    objectives = cfg.task.objectives
    weights = {objective["weight"] for objective in objectives.values()}
    entries = {
        "losses": sorted(objectives),
        "weight_of_losses": weights.pop() if len(weights) == 1 else weights,
        "metric": cfg.task.metric,
    }
    for name, objective in objectives.items():
        if "hidden_scale" in objective:
            entries["head_hidden"] = int(2 * cfg.cross["width"] * objective["hidden_scale"])
            entries["head_layers"] = objective["layers"]
        if "dropout" in objective:
            entries["head_dropout"] = objective["dropout"]
        if name == "mlm":
            entries["mlm"] = (objective["probability"], objective["masking"], objective["norm_eps"])
        if name == "itm":
            entries["itm_negatives"] = objective["negatives"]
            if objective.get("frozen_head"):
                entries["itm_head_frozen"] = True
        if name == "irtr":
            entries["false_texts"] = (objective["texts"], objective["false_texts"])
        if name in ("itc", "contrastive"):
            entries["contrast"] = (objective["size"], objective["temperature"], objective.get("positives"))
        if name == "glue":
            entries["glue_task"] = objective["task"]
        if name == "cifar":
            entries["cifar_head"] = objective["head"]
    for evaluator in cfg.task.evaluators.values():
        entries |= {key: evaluator[key] for key in ("ranker", "k_test")}
    return entries


def differences(values: dict[str, Any], expected: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(here, official) by key; products of rates may differ in their last bit."""
    return {key: (values[key], expected[key]) for key in expected if not same(values[key], expected[key])}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def test_every_experiment_is_in_the_table():
    assert set(all_experiments()) - OWN == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_are_the_official_ones(name):
    cfg = recipe(name)
    expected = ALWAYS | EXPECTED[name]
    assert cfg.name == name and cfg.init_from is None
    values = found(cfg, gpus=expected["micro_batch"][1])
    assert values.keys() == expected.keys()
    assert differences(values, expected) == {}, name


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_the_global_batch_is_exact_on_any_number_of_ranks(ranks):
    for name in EXPECTED:
        cfg = recipe(name)
        most, batch = cfg.trainer.micro_batch, cfg.global_batch
        if batch % ranks:  # GLUE, and ManagerTower's 480 for VQA
            nearest = "64" if batch < ranks else "256 and 512"
            said = f"global_batch={batch} is not a multiple of {ranks} ranks .*: {nearest}$"
            with pytest.raises(ConfigError, match=said):
                micro_batches(batch, ranks, most)
            continue
        parts = micro_batches(batch, ranks, most)
        size = batch // (ranks * parts)
        assert size * ranks * parts == batch and 1 <= size <= most, name
        assert size == min(most, batch // ranks), name


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "parts"),
    [(4096, 64, 32, 2), (4096, 1, 32, 128), (4096, 512, 32, 1), (512, 8, None, 1), (480, 8, 4, 15)],
)
def test_micro_batches(batch, ranks, most, parts):
    assert micro_batches(batch, ranks, most) == parts


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "nearest"),
    [
        (512, 6, 4, "504 and 528"),
        (100, 8, 4, "96 and 128"),
        (504, 8, 4, "480 and 512"),  # ManagerTower's VQA, where the released code takes 480 without a word
        (16, 64, 4, "64"),
        (100, 8, None, "96 and 104"),
        (20, 8, 8, "16 and 24"),  # one micro-batch a rank may be smaller
    ],
)
def test_a_batch_that_cannot_be_exact_names_the_nearest(batch, ranks, most, nearest):
    with pytest.raises(ConfigError, match=f"the nearest that are: {nearest}$"):
        micro_batches(batch, ranks, most)
    assert all(micro_batches(int(number), ranks, most) for number in nearest.split(" and "))


def test_a_shared_default_that_moves_is_found():
    """The test above, on a configuration that differs in one place."""
    for change, key in (
        ("optimizer.betas=[0.9,0.999]", "betas"),
        ("optimizer.eps=1e-6", "eps"),
        ("optimizer.groups=all_norms", "groups"),
        ("optimizer.head_multiplier=5", "lr"),
        ("cross.dropout=0", "cross_dropout"),
        ("encoder.text.dropout=0", "text_dropout"),
        ("task.objectives.vqa.weight=0.5", "weight_of_losses"),
        ("task.objectives.vqa.layers=1", "head_layers"),
        ("data.eval_transform=clip", "transforms"),
        ("trainer.micro_batch=8", "micro_batch"),
    ):
        values, expected = found(compose_run("experiment=vqa_base", change), 8), ALWAYS | EXPECTED["vqa_base"]
        assert list(differences(values, expected)) == [key], change


@pytest.mark.parametrize("name", ["cifar10", "glue_cola"])
def test_uni_modal_groups_are_the_official_ones(name):
    """run_cifar.py and run_glue.py exempt what has `bias` or `LayerNorm.weight` in its name: the choice that
    optimizer.groups=official comes to for encoders alone. All of it trains at one rate."""
    cfg = compose_run(f"experiment={name}", "trainer=smoke")
    tokenizer = make_tokenizer(texts=["a text"], **cfg.encoder.text["tokenizer"])
    classes = list(TASKS["cola"].classes.values()) if name == "glue_cola" else ["cat", "dog"]
    groups = parameter_groups(build_model(cfg, tokenizer, {"classes": classes}), cfg.optimizer)
    decayed = {name: group["weight_decay"] > 0 for group in groups for name, _ in group["params"]}
    assert decayed == {name: "bias" not in name and "LayerNorm.weight" not in name for name in decayed}
    assert {group["lr"] for group in groups} == {1e-5}
    read = "tower.text." if name == "glue_cola" else "tower.vision."
    assert all(name.startswith((read, "objectives.")) for name in decayed) and len(set(decayed.values())) == 2
