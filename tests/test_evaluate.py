"""`bt.evaluate` on a run that `bt.train` left: what it takes, what it refuses and where it writes."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import RobertaConfig

import bt.evaluate
import bt.evaluation
from bt.assemble import build_model, without_weights
from bt.config.entry import one_line
from bt.data.shards import ShardSet
from bt.engine.initial import load_weights, weights_file
from bt.errors import CheckpointError, ConfigError
from tests.test_config import composed
from tests.test_train import run

VQA = "experiment=easy_vqa"
SMOKE = ["trainer=smoke", "tracking=none", "data.workers=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_dir) -> Path:
    """A finished run on the few samples."""
    root = tmp_path_factory.mktemp("trained")
    done = run("bt.train", VQA, *SMOKE, f"data.dir={few_dir}", f"run_dir={root / 'run'}", "trainer.threads=1", cwd=root)
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture
def relabelled(tmp_path, few_dir) -> Path:
    """The same shards, the first two answers exchanged in their index."""
    shards = shutil.copytree(few_dir, tmp_path / "shards")
    for path in shards.rglob("index.json"):
        index = json.loads(path.read_text())
        answers = index["labels"]["answers"]
        answers[:2] = reversed(answers[:2])
        path.write_text(json.dumps(index))
    return shards


@pytest.fixture
def evaluate(monkeypatch, capfd, tmp_path):
    """Runs the command in this process: exit status, returned metric, standard output and error."""

    def command(*arguments: object) -> SimpleNamespace:
        returned = []
        inner = evaluate_run

        def spy(cfg):
            returned.append(inner(cfg))
            return returned[-1]

        monkeypatch.setattr(bt.evaluation, "evaluate_run", spy)
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        try:
            bt.evaluate.main()
            status = 0
        except SystemExit as end:
            status = end.code
        out, error = capfd.readouterr()
        return SimpleNamespace(status=status, value=returned[0] if returned else None, out=out, error=error)

    evaluate_run = bt.evaluation.evaluate_run
    monkeypatch.chdir(tmp_path)
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield command
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def test_the_metric_of_the_split_is_returned_and_the_runs_own_results_stay(trained, evaluate):
    reported = json.loads((trained / "report.json").read_text())["metrics"]
    before = (trained / "predictions-test.jsonl").read_bytes()
    done = evaluate(f"run_dir={trained}", "split=test")
    assert (done.status, done.error) == (0, "") and "heads taken: vqa" in done.out
    own = json.loads((trained / "evaluation-test.json").read_text())
    assert done.value == own["metrics"]["vqa/test/score"] == reported["vqa/test/score"] and own["overrides"] == []
    assert evaluate(f"run_dir={trained}", "split=val").value == reported["vqa/val/score"]
    # Other options, and the run's own results stay; an option that changes no result is not such.
    less = evaluate(f"run_dir={trained}", "split=test", "eval.max_samples=2")
    assert less.status == 0, less.error
    (found,) = (trained / "evaluations").iterdir()
    other = json.loads((found / "evaluation-test.json").read_text())
    assert other["overrides"] == ["eval.max_samples=2"] and less.value == other["metrics"]["vqa/test/score"]
    assert 0 < len((found / "predictions-test.jsonl").read_bytes()) < len(before)
    assert evaluate(f"run_dir={trained}", "split=test", "data.prefetch=2").status == 0
    assert (trained / "predictions-test.jsonl").read_bytes() == before
    assert [path.name for path in (trained / "evaluations").iterdir()] == [found.name]
    assert json.loads((trained / "evaluation-test.json").read_text())["metrics"] == own["metrics"]


def test_weights_alone_with_task_and_data(trained, few_dir, evaluate, tmp_path):
    """init_from: a run, a checkpoint or a file, with a configuration of one's own."""
    reported = json.loads((trained / "report.json").read_text())["metrics"]
    own = ["task=vqa", f"data.dir={few_dir}", "encoder=tiny", "cross=tiny", "data.max_text_len=16", "trainer.threads=1"]
    own += ["eval.max_samples=8", "eval.batch=8"]  # as trainer=smoke has it
    for source in (trained, trained / "checkpoints/best", trained / "checkpoints/best/model.safetensors"):
        done = evaluate(f"init_from={source}", *own, "split=val")
        assert (done.status, done.value) == (0, reported["vqa/val/score"]), done.error
    written = [json.loads(path.read_text()) for path in (tmp_path / "evaluations").glob("*/evaluation-val.json")]
    own_figures = {key: value for key, value in reported.items() if "/val/" in key}
    assert [found["metrics"] for found in written] == 3 * [own_figures]
    done = evaluate(f"init_from={trained}", *own, "run_dir=there")
    assert (done.status, done.value) == (0, reported["vqa/test/score"])
    assert (tmp_path / "there/predictions-test.jsonl").read_bytes() == (trained / "predictions-test.jsonl").read_bytes()
    for changed, said in (
        ("cross.width=64", "another architecture: tower.text_projection.weight: has (32, 32), needs (64, 32)"),
        ("task=pretrain", "has no trained head for mlm, itm"),
    ):
        done = evaluate(f"init_from={trained}", *own, changed)
        assert done.status == 1 and done.error.count("\n") == 1 and said in done.error, done.error


def test_three_ranks_measure_what_one_does(trained, few_dir, tmp_path):
    """Neither the questions nor their batches divide by three: each is measured once, in the split's order."""
    settings = ["split=test", "eval.batch=7", "eval.max_samples=null"]
    three = ["--standalone", "--nproc-per-node=3", "-m", "bt.evaluate"]
    found = {}
    for module, arguments, name in (("bt.evaluate", [], "one"), ("torch.distributed.run", three, "three")):
        shutil.copytree(trained, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("evaluations"))
        done = run(module, *arguments, *settings, f"run_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / name / "evaluations").iterdir()
        rows = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text().splitlines()]
        found[name] = json.loads((folder / "evaluation-test.json").read_text())["metrics"], rows
    data = ShardSet(few_dir, "test")
    asked = [entry["id"] for number in range(len(data)) for entry in data.read(number).info["questions"]]
    batches = -(-len(asked) // 7)
    assert len(asked) % 7 and batches % 3 and len(asked) > 100
    assert [row["question_id"] for row in found["three"][1]] == asked
    assert found["three"][1] == found["one"][1]
    assert found["three"][0] == pytest.approx(found["one"][0], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run_dir={run}", "~cross.dropout"], "~cross.dropout does not go with run_dir"),
        (["run_dir={run}", "trainer=smoke"], "trainer=smoke does not go with run_dir"),
        (["run_dir={run}", "init_from={run}"], "holds a run of its own"),
        ([], "give run_dir=DIR of a trained run, or init_from=PATH"),
        (["run_dir={run}", "split=dev"], "'dev'"),
    ],
)
def test_what_does_not_go_is_one_line(trained, evaluate, arguments, said):
    done = evaluate(*(argument.format(run=trained) for argument in arguments))
    assert done.status == 1 and done.error.count("\n") == 1 and said in done.error


def test_a_head_is_not_used_for_other_answers(trained, relabelled, few_dir, evaluate):
    done = evaluate(f"run_dir={trained}", f"data.dir={relabelled}")
    first, second = ShardSet(str(few_dir), "train").labels["answers"][:2]
    difference = f"labels 'answers': number 0 is {first!r} in the checkpoint and {second!r} in the data"
    assert done.status == 1 and difference in done.error and done.error.count("\n") == 1
    # A start from it as well, unless its heads are to start new.
    cfg, weights = composed("encoder=tiny", "cross=tiny", "task=vqa"), weights_file(trained)
    tokenizer = bt.evaluation.tokenizer_of(weights)
    labels = ShardSet(str(relabelled), "train").labels
    model = build_model(cfg, tokenizer, labels)
    with pytest.raises(CheckpointError, match="the head of vqa does not fit: labels 'answers': number 0"):
        load_weights(weights, model, labels=labels)
    loaded = load_weights(weights, model, labels=labels, ignore_heads=True)
    assert (loaded.new, loaded.reused) == (["vqa"], [])
    assert load_weights(weights, model, labels={"others": ["a"]}).reused == ["vqa"]
    # Heads whose rows are no labels do not care.
    pretraining = build_model(composed("encoder=tiny", "cross=tiny", "task=pretrain"), tokenizer, labels)
    assert load_weights(weights, pretraining, labels=labels).unused == ["vqa"]


def test_the_tokenizer_of_the_weights_is_used_though_another_is_named(trained, evaluate):
    tokenizer = "encoder.text.tokenizer={kind: pretrained, name: /nonexistent}"
    done = evaluate(f"run_dir={trained}", "split=test", tokenizer)
    own = json.loads((trained / "report.json").read_text())["metrics"]
    assert (done.status, done.value) == (0, own["vqa/test/score"]), done.error


def test_encoders_whose_weights_follow_need_none_of_their_own(tmp_path):
    """A text encoder's folder without weights, and with more rows than its tokenizer has tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaConfig(vocab_size=40, max_position_embeddings=60, **sizes).save_pretrained(tmp_path)
    cfg = composed("encoder=tiny", "cross=tiny", "task=pretrain")
    cfg.encoder.text |= {"name": str(tmp_path), "pretrained": True, "config": None}
    tokenizer = SimpleNamespace(vocab_size=37, pad_id=1, mask_id=4, special_ids=[0, 1, 2, 3, 4])
    with pytest.raises(ConfigError) as error:
        build_model(cfg, tokenizer, {})
    assert "cannot be fetched" in one_line(error.value)
    tower = build_model(cfg, tokenizer, {}, pretrained=False).tower
    assert tower.text.model.embeddings.word_embeddings.weight.shape == (40, 16)
    assert cfg.encoder.text["pretrained"] is True


def test_without_weights_the_activation_is_still_theirs():
    node = {
        "_target_": "bt.models.encoders.open_clip_vit.OpenClipVision",
        "name": "ViT-B-16",
        "pretrained": "openai",
        "image_size": 32,
    }
    bare = without_weights(node)
    assert (bare["name"], bare["pretrained"], bare["image_size"]) == (None, None, 32)
    assert bare["architecture"] | {"width": 768, "layers": 12, "quick_gelu": True} == bare["architecture"]
    assert without_weights({"_target_": "x", "image_size": 4}) == {"_target_": "x", "image_size": 4}
