"""Checkpoints: exact, atomic, and refused in one line where they do not fit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bt.config import OptimizerConfig
from bt.engine.checkpoint import best_checkpoint, contents, last_checkpoint, read_state, resume, save
from bt.engine.distributed import World
from bt.engine.initial import load_weights
from bt.engine.optimizer import build_optimizer
from bt.engine.saver import Saver
from bt.errors import CheckpointError
from bt.models.bridges.add import AddBridge
from bt.models.bridgetower import BridgeTower
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision
from bt.tasks.base import Context, TaskModel
from bt.tasks.irtr import IRTR
from bt.tasks.itm import ITM
from bt.tasks.vqa import VQA

ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "type_vocab_size": 1,
}


def make_model(seed: int = 0, image_size: int = 32, width: int = 16, answers: int = 3, itm: bool = False) -> TaskModel:
    torch.manual_seed(seed)
    vit = {"width": 16, "layers": 1, "patch_size": 16, "head_width": 8, "quick_gelu": True}
    tower = BridgeTower(
        OpenClipVision(image_size=image_size, architecture=vit),
        HFText(config=ROBERTA),
        AddBridge(width, 1),
        AddBridge(width, 1),
        CoAttention(width=width, heads=2, layers=1),
    )
    context = Context(width, 16, 16, SimpleNamespace(), {"answers": [str(i) for i in range(answers)]})
    return TaskModel(tower, {"vqa": VQA(context)} | ({"itm": ITM(context)} if itm else {}))


def step(model: TaskModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step on gradients that depend on the step alone; the pooler of images never has one."""
    generator = torch.Generator().manual_seed(number)
    for name, parameter in model.named_parameters():
        if not name.startswith("tower.image_pooler"):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] / (1 + number)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def tensors_of(model: TaskModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {file: dict(named) for file, named in contents(model, optimizer).items()}


def save_simply(run_dir: Path, number: int, model: TaskModel, best: bool = False) -> Path:
    return save(run_dir, step=number, tensors=tensors_of(model, build_optimizer(model, CFG)), state={}, best=best)


CFG = OptimizerConfig(lr=1e-2)


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path):
    unbroken = make_model()
    optimizer = build_optimizer(unbroken, CFG)
    for number in range(3):
        step(unbroken, optimizer, number)
    (tmp_path / "made.json").write_text('{"vocabulary": 1}')
    where = save(
        tmp_path,
        step=3,
        tensors=tensors_of(unbroken, optimizer),
        state={"best": 0.5, "run_id": "abc"},
        tokenizer=tmp_path / "made.json",
    )
    for number in range(3, 6):
        step(unbroken, optimizer, number)
    resumed = make_model(seed=1)
    other = build_optimizer(resumed, CFG)
    assert not same(unbroken, resumed)
    assert resume(last_checkpoint(tmp_path), resumed, other) == {"step": 3, "best": 0.5, "run_id": "abc"}
    for number in range(3, 6):
        step(resumed, other, number)
    assert same(unbroken, resumed)
    # Parameters without gradient have no state, so they are neither moved nor decayed after a resume either.
    without = {name for name, p in resumed.named_parameters() if p not in other.state}
    assert without == {"tower.image_pooler.dense.weight", "tower.image_pooler.dense.bias"}
    assert {path.name for path in where.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "tokenizer.json",
    }
    assert (where / "tokenizer.json").read_text() == '{"vocabulary": 1}'
    assert len({path.stat().st_mode for path in where.iterdir()}) == 1, "who may read one file may read the checkpoint"


def test_last_and_best_point_at_what_is_kept(tmp_path):
    model = make_model()
    for number, best in ((1, False), (2, True), (3, False), (4, False)):
        save_simply(tmp_path, number, model, best)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "last", "step-00000002", "step-00000004"]
    assert (best_checkpoint(tmp_path).name, last_checkpoint(tmp_path).name) == ("step-00000002", "step-00000004")
    assert os.readlink(root / "last") == "step-00000004"  # relative, so that a run can be moved
    # The checkpoint just saved turns out to be the best.
    save(tmp_path, step=4, tensors={}, state={"metric": 0.9}, best=True)
    assert sorted(p.name for p in root.iterdir()) == ["best", "last", "step-00000004"]
    assert read_state(best_checkpoint(tmp_path)) == {"step": 4, "metric": 0.9}
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_last_ones_are_kept_and_the_best(tmp_path):
    model = make_model()
    tensors = tensors_of(model, build_optimizer(model, CFG))
    for number in range(1, 7):
        save(tmp_path, step=number, tensors=tensors, state={}, best=number == 2, keep=3)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [f"step-{number:08d}" for number in (2, 4, 5, 6)]


def test_saving_in_the_background_takes_what_was_there(tmp_path):
    """Training changes the weights while they are written; the next save waits, and says what went wrong."""
    model = make_model()
    optimizer = build_optimizer(model, CFG)
    saver = Saver(tmp_path, World(0, 1, torch.device("cpu")), keep=2)
    for number in range(3):
        step(model, optimizer, number)
        saver.save(step=number, model=model, optimizer=optimizer, state={"number": number})
        if number < 2:
            torch.nn.init.zeros_(model.tower.text_projection.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters() if p in optimizer.state]
    step(model, optimizer, 3)
    saver.save(step=2, model=model, optimizer=optimizer, state={"number": 2, "again": True}, best=True)
    saver.wait()
    resumed = make_model(seed=1)
    other = build_optimizer(resumed, CFG)
    assert resume(last_checkpoint(tmp_path), resumed, other) == {"step": 2, "number": 2, "again": True}
    assert all(torch.equal(value, before[name]) for name, value in resumed.state_dict().items())
    found = [other.state[p]["exp_avg"] for p in resumed.parameters() if p in other.state]
    assert all(torch.equal(a, b) for a, b in zip(found, moments, strict=True))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000001", "step-00000002"]
    (tmp_path / "checkpoints/last").unlink()
    (tmp_path / "checkpoints/last").mkdir()  # cannot be replaced by a link
    for tell in (saver.wait, saver.check, lambda: saver.save(step=9, model=model, optimizer=optimizer, state={})):
        saver.save(step=saver.step + 1, model=model, optimizer=optimizer, state={})
        saver.thread.join()
        with pytest.raises(CheckpointError, match=f"checkpoint of step {saver.step} cannot be saved"):
            tell()


def assert_first_survives(run_dir: Path, error: pytest.ExceptionInfo) -> None:
    assert "checkpoint of step 2 cannot be saved" in str(error.value) and "\n" not in str(error.value)
    assert "step-00000001 is kept" in str(error.value)
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["last", "step-00000001"]
    model = make_model(seed=1)
    assert resume(last_checkpoint(run_dir), model, build_optimizer(model, CFG))["step"] == 1
    assert same(model, make_model(seed=0))


def test_a_file_that_cannot_be_written_whole_leaves_the_previous_checkpoint(tmp_path):
    model = make_model()
    save_simply(tmp_path, 1, model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            save_simply(tmp_path, 2, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert "File too large" in str(error.value)
    assert_first_survives(tmp_path, error)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for one checkpoint of `make_model` and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    size = sum(t.nbytes for t in make_model().state_dict().values())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size) // 4096 * 4096}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk):
    model = make_model()
    save_simply(small_disk, 1, model)
    with pytest.raises(CheckpointError) as error:
        save_simply(small_disk, 2, model)
    assert "GB are needed and" in str(error.value)
    assert_first_survives(small_disk, error)


def save_for_ever(run_dir: Path, start: int) -> None:
    model = make_model()
    for number in itertools.count(start):
        torch.nn.init.constant_(model.tower.text_projection.bias, number)
        save_simply(run_dir, number, model, best=number % 3 == 0)


def step_of(checkpoint: Path | None) -> int:
    """By its name alone: the directory may be gone already."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def test_killed_at_any_moment_a_complete_checkpoint_is_there(tmp_path):
    model = make_model()
    reached, start = 0, 1
    for kill in range(8):
        # Forked, because importing takes longer than all the rest.
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path, start))
        process.start()
        deadline = time.monotonic() + 60
        while min(step_of(best_checkpoint(tmp_path)), step_of(last_checkpoint(tmp_path))) < start:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.0071 * kill)
        process.kill()
        process.join()
        state = resume(last_checkpoint(tmp_path), model, build_optimizer(model, CFG))
        assert torch.equal(model.tower.text_projection.bias, torch.full((16,), float(state["step"])))
        assert read_state(best_checkpoint(tmp_path))["step"] % 3 == 0
        assert state["step"] >= start > reached
        reached, start = state["step"], state["step"] + 1
    save_simply(tmp_path, reached + 100, model)
    # What the killed ones left half-written is gone.
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "last",
        "best",
        f"step-{reached + 100:08d}",
        best_checkpoint(tmp_path).name,
    }


def test_starting_from_a_run_names_every_head(tmp_path):
    source = make_model(itm=True)
    save_simply(tmp_path, 1, source)
    target = make_model(seed=1)
    report = load_weights(tmp_path, target)
    assert (report.reused, report.new, report.unused) == (["vqa"], [], ["itm"])
    assert "heads in the checkpoint that are not used: itm" in str(report)
    assert same(target.tower, source.tower) and same(target.objectives["vqa"], source.objectives["vqa"])
    save_simply(tmp_path / "other", 1, make_model(), best=True)
    report = load_weights(tmp_path / "other" / "checkpoints" / "best", make_model(itm=True))
    assert (report.reused, report.new, report.unused) == (["vqa"], ["itm"], [])


def test_a_new_head_starts_from_another_one(tmp_path):
    """The rank head of 16-way retrieval: the match row of the ITM head, if there is no rank head already."""
    source, context = make_model(itm=True), Context(16, 16, 16, SimpleNamespace())
    save_simply(tmp_path / "first", 1, source)
    target = TaskModel(make_model(seed=1).tower, {"irtr": IRTR(context)})
    report = load_weights(tmp_path / "first", target)
    match, rank = source.objectives["itm"].head.fc, target.objectives["irtr"].head
    assert torch.equal(rank.weight, match.weight[1:]) and torch.equal(rank.bias, match.bias[1:])
    assert (report.started, report.reused, report.new) == (["irtr from itm"], [], [])
    assert report.unused == ["vqa"] and "heads started: irtr from itm" in str(report)
    # Its own head comes first, and a checkpoint without the other leaves it new.
    both = TaskModel(source.tower, {"irtr": IRTR(context), "itm": ITM(context)})
    save_simply(tmp_path / "second", 1, both)
    report = load_weights(tmp_path / "second", target)
    assert (report.started, report.reused, report.unused) == ([], ["irtr"], ["itm"])
    assert torch.equal(rank.weight, both.objectives["irtr"].head.weight)
    save_simply(tmp_path / "third", 1, make_model())
    before = rank.weight.clone()
    report = load_weights(tmp_path / "third", target)
    assert (report.started, report.new) == ([], ["irtr"]) and torch.equal(rank.weight, before)


def test_a_head_with_other_classes_is_an_error_unless_ignored(tmp_path):
    save_simply(tmp_path, 1, make_model(answers=3))
    target = make_model(seed=1, answers=5)
    head = {key: value.clone() for key, value in target.objectives.state_dict().items()}
    before = target.tower.text_projection.weight.clone()
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path, target)
    assert "the head of vqa does not fit: objectives.vqa.head.3.weight: has (3, 64), needs (5, 64)" in str(error.value)
    assert "checkpoint.ignore_heads=true" in str(error.value)
    assert torch.equal(target.tower.text_projection.weight, before)
    report = load_weights(tmp_path, target, ignore_heads=True)
    assert report.new == ["vqa"] and not torch.equal(target.tower.text_projection.weight, before)
    assert all(torch.equal(value, head[key]) for key, value in target.objectives.state_dict().items())


def test_the_encoders_alone_are_taken_from_another_architecture(tmp_path):
    source = make_model(width=16)
    save_simply(tmp_path, 1, source)
    target = make_model(seed=1, width=32)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = load_weights(tmp_path, target, encoders_only=True)
    assert same(target.tower.vision, source.tower.vision) and same(target.tower.text, source.tower.text)
    rest = {
        key: value for key, value in target.state_dict().items() if not key.startswith(("tower.vision", "tower.text."))
    }
    assert len(rest) > 10 and all(torch.equal(value, before[key]) for key, value in rest.items())
    assert report.new == ["vqa"] and str(report).startswith("weights of the encoders from ")
    other = make_model(width=16)
    del other.tower.text
    save_simply(tmp_path / "half", 1, other)
    with pytest.raises(CheckpointError, match="holds another architecture: tower.text.*: has nothing, needs"):
        load_weights(tmp_path / "half", target, encoders_only=True)


def test_another_image_size_is_fitted(tmp_path):
    source = make_model(image_size=32)
    save_simply(tmp_path, 1, source)
    target = make_model(seed=1, image_size=64)
    load_weights(tmp_path, target)
    table = target.tower.vision.visual.positional_embedding
    assert table.shape == (17, 16)
    assert torch.equal(table[0], source.tower.vision.visual.positional_embedding[0])


def test_another_architecture_is_refused_with_keys_and_shapes(tmp_path):
    save_simply(tmp_path, 1, make_model(width=16))
    target = make_model(width=32)
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path, target)
    assert "holds another architecture: tower.text_projection.weight: has (16, 16), needs (32, 16); " in str(
        error.value
    )
    with pytest.raises(CheckpointError, match="another architecture"):
        resume(last_checkpoint(tmp_path), target, build_optimizer(target, CFG))
    deeper = make_model()
    deeper.tower.text_bridge = AddBridge(16, 2)
    with pytest.raises(CheckpointError, match=r"tower.text_bridge.norms.1.weight: has nothing, needs \(16,\)"):
        load_weights(tmp_path, deeper)


class Payload:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, name):
    victim = tmp_path / "executed"
    torch.save({"state_dict": {"tower.x": torch.zeros(1)}, "extra": Payload(victim)}, tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path / name, make_model())
    assert f"{name} is refused" in str(error.value) and "\n" not in str(error.value)
    assert not victim.exists()
    # The payload is a real one.
    torch.load(tmp_path / name, weights_only=False)
    assert victim.exists()


def test_a_harmless_pickle_of_tensors_is_read(tmp_path):
    source, target = make_model(), make_model(seed=1)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.pt")
    load_weights(tmp_path / "model.pt", target)
    assert same(source, target)


def test_damaged_missing_and_foreign_checkpoints(tmp_path):
    model = make_model()
    where = save_simply(tmp_path / "run", 1, model)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nowhere", model)
    with pytest.raises(CheckpointError, match="is no run or checkpoint"):
        load_weights(tmp_path, model)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="must end in .safetensors"):
        load_weights(tmp_path / "notes.txt", model)
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of bt.*layer.weight"):
        load_weights(tmp_path / "foreign.safetensors", model)
    (where / "state.json").write_text(json.dumps({"step": 1})[:-3])
    with pytest.raises(CheckpointError, match="state.json cannot be read"):
        resume(where, model, build_optimizer(model, CFG))
    content = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        load_weights(where, model)
