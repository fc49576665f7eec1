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
