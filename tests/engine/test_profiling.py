"""trainer.profile and trainer.compile, and the work of a step as counted."""

import gzip
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from bt.bench.models import SIZES, make_batch, make_model, pretraining_objectives
from bt.data.batch import Texts
from bt.data.text import train_tokenizer
from bt.engine.compiled import compile_layers
from bt.engine.profiling import COSTLIEST, StepProfiler
from bt.errors import ConfigError

CPU = torch.device("cpu")


def test_a_trace_and_the_costliest_operations(tmp_path):
    weights = torch.randn(1000, 1000)
    profiler = StepProfiler(tmp_path, CPU)
    for _ in range(8):
        weights @ weights, weights[0].sin(), weights[0].exp(), weights[0] + 1
        profiler.step()
    profiler.close()
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::mm", "ProfilerStep#3", "ProfilerStep#5"} <= names and "ProfilerStep#6" not in names
    header, line, *rows = (tmp_path / "operations.txt").read_text().splitlines()
    assert header.split()[0] == "operation" and 4 <= len(rows) <= COSTLIEST
    assert rows[0].split()[0] == "aten::mm" and rows[0].split()[-1] == "1"
    assert sum(float(row.split()[2]) for row in rows) <= 100.1


def test_a_run_that_ends_sooner(tmp_path):
    profiler = StepProfiler(tmp_path, CPU)
    profiler.step()
    profiler.close()
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_compiled_layers_equal_and_do_not_compile_again_for_new_lengths(monkeypatch):
    """Texts of five lengths and batches of different numbers of masked tokens: nothing new is compiled after the third
    length, and losses are those without compilation. dynamo may not give up, which would count as nothing new."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch.manual_seed(0)
    model = make_model(SIZES["tiny"], pretraining_objectives)
    compiled = make_model(SIZES["tiny"], pretraining_objectives)
    compiled.load_state_dict(model.state_dict())
    counter = CompileCounter()
    compile_layers(compiled, CPU, backend=counter)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    counts = []
    for tokens in (8, 16, 24, 32, 40):
        batch = make_batch(SIZES["tiny"], 3, 2, (tokens, tokens))
        losses = [torch.stack([result.loss for result in m(batch).values()]) for m in (compiled, model)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        losses[0].sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[2] == counts[3] == counts[4]
    torch._dynamo.reset()


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="trainer.compile=true needs a C\\+\\+ compiler"):
        compile_layers(torch.nn.Sequential(), CPU)


def test_texts_of_few_lengths():
    tokenizer = train_tokenizer(["a b c d e f g h i j"])
    texts = ["a b c", "a b c d e f g h"]
    plain, bucketed = tokenizer.batch(texts, 50), tokenizer.batch(texts, 50, 8)
    assert isinstance(bucketed, Texts) and plain.ids.shape[1] < bucketed.ids.shape[1] == 16
    longest = plain.ids.shape[1]
    assert torch.equal(bucketed.ids[:, :longest], plain.ids) and torch.equal(bucketed.mask[:, :longest], plain.mask)
    assert (bucketed.ids[:, longest:] == tokenizer.pad_id).all() and not bucketed.mask[:, longest:].any()
    assert tokenizer.word_starts(texts, 50, 8).shape == bucketed.ids.shape
    assert tokenizer.batch(texts, 12, 8).ids.shape[1] == tokenizer.word_starts(texts, 12, 8).shape[1] <= 12


def test_profile_of_a_run(tmp_path, command):
    """trainer.profile leaves trace and table beside the run's files."""
    settings = ["trainer=smoke", "trainer.max_steps=6", "trainer.epochs=null", "trainer.profile=true"]
    off = ["tracking=none", "eval.test=false", "eval.every_epochs=null"]
    code, said = command("experiment=easy_vqa_pretrain", *settings, *off, f"run_dir={tmp_path / 'run'}")
    assert code == 0, said
    operations = (tmp_path / "run/profile/operations.txt").read_text()
    assert "aten::" in operations and len(operations.splitlines()) == 2 + COSTLIEST
    assert (tmp_path / "run/profile/trace.json.gz").is_file()
