"""The two lists of dependencies, and the Makefile's help."""

import re
import subprocess
import tomllib
from pathlib import Path

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
