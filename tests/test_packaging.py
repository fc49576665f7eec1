"""The two lists of dependencies, the Makefile's help, and the package as it is installed elsewhere."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_environment_file_lists_the_packages_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = set(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted |= set(extra)
    listed = set(re.findall(r"^      - (?!-e)(\S+)$", (ROOT / "environment.yml").read_text(), re.M))
    assert listed == wanted


def test_make_help_explains_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(phony) == set(re.findall(r"^  make (\S+)", shown, re.M))


def test_the_readme_is_finished_and_names_what_exists():
    """No figure is left out, and every source and data preset that it speaks of has its file."""
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z_]+@", text)
    for group in ("source", "experiment", "task", "data", "trainer"):
        named = set(re.findall(rf"(?<![\w.]){group}=([a-z0-9_]+)", text))
        assert named <= {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}, group
    sources = {path.stem for path in (ROOT / "conf/source").glob("*.yaml")}
    assert sources == set(re.findall(r"\bsource=([a-z0-9_]+)", text))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with the wheel of this tree, over the packages of the environment that runs the tests."""
    root = tmp_path_factory.mktemp("wheel")
    tree = root / "tree"
    # What git knows and what is new, so that nothing is built into the clone.
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    build = [*pip, "wheel", *offline, "--wheel-dir", str(root), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tree)
    venv.create(root / "venv", with_pip=False)
    own = next((root / "venv/lib").glob("python*/site-packages"))
    # Only the folder, not the editable installation that a .pth file in it names.
    (own / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = root.glob("bt-*.whl")
    target = ["--python", str(root / "venv/bin/python"), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([*pip, *target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "venv"


def test_an_installed_wheel_trains_from_any_folder(installed, tmp_path):
    around = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str) -> subprocess.CompletedProcess:
        program, *arguments = command
        return subprocess.run(
            [str(installed / "bin" / program), *arguments], cwd=tmp_path, env=around, capture_output=True, text=True
        )

    shown = run("bt-train", "--cfg", "job", "experiment=vqa_base")
    assert shown.returncode == 0, shown.stderr
    assert "name: vqa_base" in shown.stdout and "micro_batch:" in shown.stdout
    done = run("bt-train", "experiment=vqa_base", "trainer=smoke", "tracking=none", "run_dir=run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["steps"] == 3 and report["git_revision"] is None
    where = run("python", "-c", "import bt, launchers; print(bt.__file__, launchers.__file__)").stdout.split()
    site = next((installed / "lib").glob("python*/site-packages"))
    assert all(Path(path).is_relative_to(site) for path in where), where
    for file in ("bt/conf/config.yaml", "bt/app/page.html", "bt/bench/baselines.json", "launchers/slurm_local.sh"):
        assert (site / file).is_file(), file
    assert {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")} == {
        path.relative_to(site / "bt/conf") for path in (site / "bt/conf").rglob("*.yaml")
    }
    # Hydra's plug-ins are found where they are installed.
    shown = run("bt-train", "hydra/launcher=local", "--cfg", "hydra", "--package", "hydra.launcher")
    assert "_target_: hydra_plugins.bt_launchers.LocalLauncher" in shown.stdout, shown.stderr
    asked = run("bt-predict", "--run-dir", "run", "--image", "none.png", "--text", "is it red?")
    assert asked.returncode == 1 and asked.stderr == "error: none.png cannot be read: No such file or directory\n"


def test_every_console_script_has_its_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    programs = {path.stem for path in (ROOT / "bt").glob("*.py") if "\ndef main(" in path.read_text()}
    programs |= {path.parent.name for path in (ROOT / "bt").glob("*/__main__.py")}
    # The demo and the ablation belong to the clone.
    assert {target.split(":")[0].removeprefix("bt.").removesuffix(".__main__") for target in scripts.values()} == (
        programs - {"demo", "ablation"}
    ) | {"launchers"}
