"""notebooks/, executed on a small real store: they say what the runs' reports say."""

import contextlib
import json
import statistics
from pathlib import Path

import nbformat
import pytest
import torch

from bt.config import read_config
from bt.errors import UserError
from bt.report.layers import layer_similarity, layer_states, linear_cka, manager_weights, open_run
from bt.report.notebooks import FOLDER, executed, main, names
from tests.test_train import run

FIVE = ["01_bridge_ablation", "02_cross_layers", "03_learning_curves_and_cost", "04_what_the_bridges_do",
        "05_your_own_bridge"]  # fmt: skip
ADD, MANAGERS = "bridge=add cross.layers=2", "bridge=adaptive_managers cross.layers=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, few_dir) -> Path:
    """A working directory with a sweep of three bridges, one and two layers, and two seeds, in mlflow.db."""
    folder = tmp_path_factory.mktemp("notebooks")
    grid = ["bridge=none,add,adaptive_managers", "cross.layers=1,2", "seed=0,1", "hydra.sweep.dir=sweeps/small"]
    done = run("bt.train", "-m", "experiment=easy_vqa", "trainer=smoke", f"data.dir={few_dir}", *grid, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def means(folder: Path, sweep: str, metric: str) -> dict[str, float]:
    """By bridge class and layers, from the runs' own files."""
    found: dict[str, list[float]] = {}
    for path in (folder / "sweeps" / sweep).glob("*/report.json"):
        cfg = read_config(path.parent)
        key = f"{cfg.bridge['_target_'].rpartition('.')[2]} {cfg.cross['layers']}"
        found.setdefault(key, []).append(json.loads(path.read_text())["metrics"][metric])
    return {key: statistics.fmean(values) for key, values in found.items()}


def shown(notebook) -> tuple[str, int]:
    """The text of all outputs, and the number of pictures."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    text = [one.get("text/markdown", one.get("text/plain", "")) for one in data]
    text += [output.get("text", "") for output in outputs]
    return "\n".join(text), sum("image/png" in one for one in data)


def test_notebooks_are_committed_without_outputs():
    assert names() == FIVE
    for name in FIVE:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code), name
        # They read like an article.
        assert notebook.cells[0].cell_type == "markdown" and sum(len(cell.source.splitlines()) for cell in code) < 45


def test_the_bridge_ablation(folder):
    parameters = {"SWEEP": "small", "AGAINST": "bridge=none cross.layers=1"}
    text, pictures = shown(executed("01_bridge_ablation", parameters, folder))
    found = means(folder, "small", "vqa/test/score")
    for bridge, name in (("AddBridge", "add"), ("NoBridge", "none"), ("ManagerBridge", "adaptive_managers")):
        assert f"| bridge={name} cross.layers=2 | {found[f'{bridge} 2']:.4f} |" in text
    assert "12 of 12 runs finished" in text and "too few seeds for a test (2, it takes 3)" in text and pictures == 1
    assert {path.name for path in (folder / "exports").iterdir()} == {f"small.{e}" for e in ("md", "tex", "csv", "png")}


def test_the_number_of_layers_and_the_pages(folder, tmp_path):
    with contextlib.chdir(folder):
        main(["02_cross_layers", "SWEEP=small", "--out", str(tmp_path)])
    page = (tmp_path / "02_cross_layers.html").read_text()
    assert f"{means(folder, 'small', 'vqa/test/score')['AddBridge 1']:.4f}" in page and "data:image/png;base64" in page


def test_curves_and_cost(folder):
    text, pictures = shown(executed("03_learning_curves_and_cost", {"SWEEP": "small"}, folder))
    report = next(json.loads(path.read_text()) for path in (folder / "sweeps/small").glob("*/report.json"))
    assert pictures == 4 and f"{report['cost']['parameters']['bridges'] / 1e6:.3f}" in text


def test_what_the_bridges_do(folder):
    parameters = {"SWEEP": "small", "BRIDGED": ADD, "MANAGED": MANAGERS, "PAIRS": 8}
    _, pictures = shown(executed("04_what_the_bridges_do", parameters, folder))
    assert pictures == 4


def test_a_bridge_of_ones_own_in_under_twenty_lines(folder):
    """The notebook really adds it: outside the package, by --config-dir and plugins alone."""
    text, _ = shown(executed("05_your_own_bridge", {}, folder))
    files = [folder / "my_project/bridges/maximum.py", folder / "my_project/conf/bridge/maximum.yaml"]
    assert sum(len(path.read_text().splitlines()) for path in files) < 20
    found = means(folder, "my_bridge", "vqa/val/score")
    assert set(found) == {"AddBridge 2", "MaximumBridge 2"}
    assert f"| bridge=maximum | {found['MaximumBridge 2']:.4f} |" in text and "6 of 6 runs finished" in text


def test_a_mistaken_variable_is_named():
    with pytest.raises(UserError, match="SWEEPS is no variable of 02_cross_layers: it has SWEEP, METRIC, URI"):
        executed("02_cross_layers", {"SWEEPS": "x"}, Path())


def opened(folder: Path, bridge: str):
    found = [path.parent for path in (folder / "sweeps/small").glob("*/report.json")]
    chosen = [run for run in found if read_config(run).bridge["_target_"].endswith(bridge)]
    with contextlib.chdir(folder):
        return open_run(next(run for run in sorted(chosen) if read_config(run).cross["layers"] == 2), pairs=8)


def test_states_and_shares_are_those_of_the_forward_pass(folder):
    """The recorded outputs are what `fuse` gives, and the managers' shares rebuild their output."""
    model = opened(folder, "ManagerBridge")
    states = layer_states(model)
    assert [len(states[name].uni) for name in states] == [len(states[name].cross) for name in states] == [2, 2]
    names, table = layer_similarity(states["text"])
    assert names == ["uni -2", "uni -1", "cross 1", "cross 2"] and torch.equal(table, table.T)
    assert torch.all(table > 0) and torch.all(table <= 1 + 1e-6) and table[0, 1] < 1
    for name, weights in manager_weights(model).items():
        assert weights.shape == (2, 2) and torch.allclose(weights.sum(1), torch.ones(2)), name
    bridge = model.tower.image_bridge
    experts = [torch.randn(1, 3, 32) for _ in range(2)]
    placed = [state + place for state, place in zip(experts, bridge.layer_embeddings.weight, strict=True)]
    normed = torch.stack([norm(state) for norm, state in zip(bridge.managers[0].norms, placed, strict=True)], dim=1)
    assert torch.allclose((bridge.shares(0, None, None) * normed).sum(1), bridge(0, experts, None, None, None))


def test_cka_ignores_rotations_and_factors():
    one, other = torch.randn(200, 6), torch.randn(200, 4)
    turned = one @ torch.linalg.qr(torch.randn(6, 6)).Q * 3 + 1
    assert linear_cka(one, turned) == pytest.approx(1) and linear_cka(one, other) < 0.3
    # Of one column each it is the squared correlation.
    a, b = one[:, :1], one[:, :1] + other[:, :1]
    assert linear_cka(a, b) == pytest.approx(float(torch.corrcoef(torch.cat([a, b], 1).T)[0, 1]) ** 2)
