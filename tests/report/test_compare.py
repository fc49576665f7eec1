"""Sweeps in a real MLflow store: what is finished, what is missing, means, significance, cost, and what is written."""

import csv
import itertools
import json
import statistics
from dataclasses import replace

import pytest
from scipy.stats import ttest_1samp

from bt.engine.cost import PARTS
from bt.engine.members import members_of
from bt.engine.mlflow_store import MEMBER, MEMBERS, PARENT, make_client
from bt.report.__main__ import main
from bt.report.compare import compare, holm
from bt.report.runs import read_sweep
from bt.report.write import as_csv, as_latex, as_markdown, as_text, draw_cost, draw_curves, draw_means, mean_curve
from tests.test_train import run

SCORES = {"none": (0.50, 0.52, 0.51), "add": (0.70, 0.73, 0.71), "gate": (0.60, 0.40, None), "mlp": (None, None, None)}
METRIC, LOSS = "vqa/test/score", "vqa/train/loss"


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A store with a sweep of four bridges and three seeds; one of gate has failed, mlp was never begun."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db"
    client = make_client(uri, 5)
    experiment = client.create_experiment("bt")
    members = [f"experiment=vqa bridge={bridge} seed={seed}" for bridge, seed in itertools.product(SCORES, (0, 1, 2))]
    named = {"bt.sweep": "true", MEMBERS: json.dumps(members)}
    parent = client.create_run(experiment, run_name="bridges", tags=named).info.run_id
    client.create_run(experiment, run_name="other", tags={"bt.sweep": "true"})
    for bridge, scores in SCORES.items():
        for seed, score in enumerate(scores):
            if bridge != "mlp":
                make_member(client, experiment, parent, bridge, seed, score)
    return uri


def make_member(client, experiment: str, parent: str, bridge: str, seed: int, score: float | None) -> None:
    member = f"experiment=vqa bridge={bridge} seed={seed}"
    tags = {PARENT: parent, MEMBER: member, "device_type": "cpu", "threads": "2", "world_size": "1"}
    tags |= {f"cost.{kind}.{part}": "1000000" for kind in ("parameters", "flops") for part in PARTS}
    made = client.create_run(experiment, tags=tags).info.run_id
    for key, value in (("seed", seed), ("task.metric", "vqa/val/score"), ("task.mode", "max")):
        client.log_param(made, key, value)
    for step, value in ((10, 3.0 + seed), (20, 2.0 + seed)):
        client.log_metric(made, LOSS, value, step=step)
    if score is None:
        client.set_terminated(made, "FAILED")
        return
    # The best checkpoint is the one at step 20: the last evaluation is worse.
    for step, value in ((10, score - 0.2), (20, score + 0.1), (30, score - 0.1)):
        client.log_metric(made, "vqa/val/score", value, step=step)
        client.log_metric(made, "vqa/val/loss", step / 10, step=step)
    client.log_metric(made, METRIC, score, step=30)
    client.set_tag(made, "pairs_per_second", str(100.0 + seed))
    client.set_tag(made, "seconds", "1800.0")
    client.set_terminated(made, "FINISHED")


def test_means_are_over_seeds_and_what_is_missing_is_named(uri):
    sweep = read_sweep("bridges", uri)
    assert len(sweep.runs) == 12 and [run.member.split()[1] for run in sweep.runs[::3]] == [
        f"bridge={bridge}" for bridge in SCORES
    ]
    found = compare(sweep, METRIC)
    assert [setting.name for setting in found.settings] == [f"bridge={bridge}" for bridge in SCORES]
    add = found["bridge=add"]
    assert add.values == {"0": 0.70, "1": 0.73, "2": 0.71} and add.complete
    assert add.mean == pytest.approx(0.7133333) and add.spread == pytest.approx(statistics.stdev(SCORES["add"]))
    assert add.pairs_per_second == 101 and add.hours == pytest.approx(3 * 0.5 * 2)  # two cores each
    assert add.cost("parameters") == 5e6 and add.cost("flops", "bridges") == 1e6
    gate, mlp = found["bridge=gate"], found["bridge=mlp"]
    assert gate.mean == pytest.approx(0.5) and not gate.complete
    assert mlp.mean is mlp.spread is mlp.hours is None and len(mlp.runs) == 3
    status = (
        "8 of 12 runs finished; experiment=vqa bridge=gate seed=2: failed; experiment=vqa bridge=mlp seed=0: missing"
    )
    assert sweep.status.startswith(status)


def test_validation_metrics_are_those_of_the_best_checkpoint(uri):
    found = compare(read_sweep("bridges", uri))
    assert found.metric == "vqa/val/score"
    assert found["bridge=add"].values == pytest.approx({"0": 0.80, "1": 0.83, "2": 0.81})
    assert compare(read_sweep("bridges", uri), "vqa/val/loss")["bridge=add"].mean == 2.0


def test_significance_is_paired_and_says_where_seeds_are_too_few(uri):
    found = compare(read_sweep("bridges", uri), METRIC, against="bridge=none")
    differences = [a - b for a, b in zip(SCORES["add"], SCORES["none"], strict=True)]
    add, gate, none = found["bridge=add"], found["bridge=gate"], found["bridge=none"]
    assert add.difference == pytest.approx(statistics.fmean(differences))
    # A paired test is the one-sample test of the differences; only one setting could be tested.
    assert add.p == pytest.approx(ttest_1samp(differences, 0).pvalue) and add.p < 0.01
    assert gate.p is None and gate.note == "too few seeds for a test (2, it takes 3)"
    assert gate.difference == pytest.approx((0.60 - 0.50 + 0.40 - 0.52) / 2)
    assert (none.difference, none.p, none.note) == (None, None, "")
    assert "bridge=gate: too few seeds for a test (2, it takes 3)." in found.notes


def test_holms_correction():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_what_is_written(uri):
    found = compare(read_sweep("bridges", uri), METRIC, against="bridge=none")
    text, markdown, latex = as_text(found), as_markdown(found), as_latex(found)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("bridge=")}
    assert lines["bridge=add"][1:8] == ["0.7133", "0.0153", "3", "3", "of", "3", "+0.2033"]
    assert lines["bridge=gate"][1:7] == ["0.5000*", "0.1414", "2", "2", "of", "3"]
    assert lines["bridge=mlp"][1:7] == ["-", "-", "0", "0", "of", "3"]
    assert "8 of 12 runs finished" in text and "A mean marked * is over the runs that finished alone." in text
    assert "| bridge=gate | 0.5000* | 0.1414 | 2 | 2 of 3 |" in markdown and "bridge=mlp seed=2: missing" in markdown
    assert r"bridge=add & 0.7133 & 0.0153 & 3 & 3 of 3 &" in latex and r"\end{tabular}" in latex
    rows = list(csv.DictReader(as_csv(found).splitlines()))
    assert len(rows) == 12 and {row["status"] for row in rows} == {"finished", "failed", "missing"}
    assert [float(row[METRIC]) for row in rows if row["setting"] == "bridge=add"] == list(SCORES["add"])
    assert [row[METRIC] for row in rows if row["setting"] == "bridge=gate"][2] == ""


def test_curves_are_means_over_seeds_at_common_steps(uri):
    runs = compare(read_sweep("bridges", uri), METRIC)["bridge=add"].runs
    assert mean_curve([run.curve(LOSS) for run in runs]) == [(10, 4.0, 3.0, 5.0), (20, 3.0, 2.0, 4.0)]
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0)]]) == [(2, 5.0, 4.0, 6.0)]


def test_pictures_show_what_there_is(uri):
    found = compare(read_sweep("bridges", uri), METRIC)
    (axes,) = draw_means(found).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bridge=none", "bridge=add", "bridge=gate"]
    assert sorted(axes.collections[1].get_offsets()[:, 0]) == sorted(SCORES["add"])
    (axes,) = draw_curves(found, LOSS, ["bridge=add"]).axes
    assert axes.lines[0].get_ydata().tolist() == [4.0, 3.0]
    (axes,) = draw_curves(replace(found, settings=[found["bridge=add"]] * 12), LOSS).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12
    (axes,) = draw_cost(found, "parameters").axes
    assert {text.get_text() for text in axes.texts} == {"bridge=none", "bridge=add", "bridge=gate"}


def test_the_command_prints_and_writes_the_table(uri, tmp_path, capsys):
    words = ["--sweep", "bridges", "--uri", uri, "--metric", METRIC, "--against", "bridge=none", "--out", str(tmp_path)]
    main(words)
    shown = capsys.readouterr().out
    assert "8 of 12 runs finished" in shown and "0.7133" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"bridges.{end}" for end in ("csv", "md", "png", "tex")]
    assert "| bridge=add | 0.7133 |" in (tmp_path / "bridges.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep", "nope"], r"store.db has no sweep nope; it has bridges, other$"),
        (["--sweep", "bridges", "--metric", "x"], "no finished run of sweep bridges has x; they have vqa/test/score, "),
        (["--sweep", "bridges", "--against", "x"], "sweep bridges has no setting x; it has bridge=none, bridge=add"),
        (["--sweep", "other"], "sweep other has 0 objective metrics: name one"),
    ],
)
def test_mistakes_are_one_line(uri, words, said):
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        main([*words, "--uri", uri])


def test_a_multirun_shows_what_has_failed_and_what_was_never_tracked(tmp_path):
    """The real thing: a rate that overflows ends a run, texts longer than the encoder takes end it before it begins."""
    settings = [
        "experiment=snli_ve_base",
        "trainer=smoke",
        "tracking.uri=sqlite:///store.db",
        "hydra.sweep.dir=sweeps/cut",
    ]
    done = run("bt.train", "-m", *settings, "optimizer.lr=0.001,1e+30", "data.max_text_len=50,100", cwd=tmp_path)
    assert done.returncode == 1
    sweep = read_sweep("cut", f"sqlite:///{tmp_path}/store.db")
    assert [(run.member, run.status) for run in sweep.runs] == [
        ("optimizer.lr=0.001 data.max_text_len=50", "FINISHED"),
        ("optimizer.lr=0.001 data.max_text_len=100", "missing"),
        ("optimizer.lr=1e+30 data.max_text_len=50", "FAILED"),
        ("optimizer.lr=1e+30 data.max_text_len=100", "missing"),
    ]
    assert members_of(tmp_path / "sweeps/cut") == [run.member for run in sweep.runs]
    (report,) = [json.loads(path.read_text()) for path in tmp_path.glob("sweeps/cut/*/report.json")]
    found = compare(sweep)
    (finished,) = [setting for setting in found.settings if setting.values]
    assert finished.mean == report["metrics"]["snli_ve/val/accuracy"]
    assert finished.cost("parameters") == report["parameters"]["all"]
    assert finished.hours == pytest.approx(report["seconds"] * report["threads"] / 3600)
