"""README.md and docs/: links, anchors, commands, the table of recipes, and the site."""

import functools
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image, ImageChops, ImageStat

from bt.config import compose_run
from bt.config.entry import CONF_DIR, register
from bt.convert import ConvertConfig
from tests.test_recipes import recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\n(?P<block>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@functools.cache
def anchors(page: Path) -> set[str]:
    """GitHub's: lower case, letters, digits, "_" and "-", a "-" for each space; the second of a kind gets a number."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if n == 0 else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_anchors(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One, two\n\n## `key=value`\n\n## One, two\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#one-two-1) [c](other.md#keyvalue) [d](gone.md) [`e`](other.md#three)\n")
    assert broken(page) == ["gone.md", "other.md#three"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page):
    code = " ".join(re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())))
    files = re.findall(r"\b(?:bt|conf|docs|launchers|tests)/[\w./-]+\.\w+", code)
    assert [file for file in files if not (ROOT / file).exists() and "NAME" not in file] == []
    tests = re.findall(r"(?:^|[\s:/])(test_\w+)(?![\w.])", code)
    known = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in tests if not re.search(rf"\b{name}\(", known)] == []
    for folder, name in re.findall(r"((?:tests/)?(?:\w+/)*test_\w+\.py)(?:::(test_\w+))?", code):
        path = ROOT / "tests" / folder.removeprefix("tests/")
        assert path.exists() and name in path.read_text(), f"{folder}::{name}"


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's blocks and inline code, from `python -m`, `torchrun` or `make` on."""
    text = page.read_text()
    lines = []
    for match in FENCE.finditer(text):
        if match["language"] in ("", "sh", "bash", "console"):
            lines += match["block"].replace("\\\n", " ").splitlines()
    rest = FENCE.sub("", text)
    lines += [code for code in re.findall(r"`([^`\n]+)`", rest) if re.match(r"python -m \w+\S* \w|make [a-z]", code)]
    # A row of a table whose heading is a command: the options that it goes on with.
    for program, rows in re.findall(r"^\|[^\n]*`(python -m bt\.\w+) \.\.\.[^\n]*\n((?:\|[^\n]*\n)+)", rest, re.M):
        lines += [f"{program} {options}" for options in re.findall(r"`((?:experiment|sweep|source)=[^`]+)`", rows)]
    found = []
    for line in lines:
        if start := re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(python3?|torchrun|make)\s", line):
            words = shlex.split(line[start.start(1) :], comments=True)
            found.append(words[: next((i for i, word in enumerate(words) if word in ("&", "&&", "|", ";")), None)])
    return found


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, and what follows; None for another program."""
    if words[0] != "make" and "-m" in words:
        place = words.index("-m")
        return words[place + 1], words[place + 2 :]
    return None


@functools.cache
def compose(module: str, overrides: tuple[str, ...]) -> None:
    if module == "bt.convert":
        register("convert", ConvertConfig)
        with hydra.initialize_config_dir(CONF_DIR, version_base="1.3"):
            hydra.compose("convert", list(overrides))
    else:
        compose_run(*overrides)


def check_options(module: str, rest: list[str]) -> None:
    """That the options compose, each value of a multirun; without the data, weights and files of one's own."""
    if "--config-dir" in rest or "..." in rest:
        return
    options = [word for word in rest if "=" in word and not word.startswith(("-", "plugins=", "hydra"))]
    if module == "bt.evaluate":
        options = [word for word in options if not word.startswith(("split=", "run_dir="))]
    choices = []
    for option in OverridesParser.create().parse_overrides(options):
        plain = option.get_key_element() + "="
        values = list(option.sweep_string_iterator()) if option.is_sweep_override() else None
        choices.append([option.input_line] if values is None else [plain + value for value in values])
    for overrides in itertools.islice(itertools.product(*choices), 12):
        compose(module, overrides)


def sources_of(module: str) -> str:
    """The code of a program, its package with it."""
    origin = Path(importlib.util.find_spec(module).origin)
    files = origin.parent.glob("*.py") if origin.name == "__init__.py" else [origin]
    return "\n".join(file.read_text() for file in files)


@functools.cache
def every_source() -> str:
    """Options can be defined in a module that several programs share."""
    return "\n".join(path.read_text() for folder in ("bt", "launchers") for path in (ROOT / folder).rglob("*.py"))


def check_command(words: list[str]) -> None:
    if words[0] == "make":
        known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        targets = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        assert targets <= known, f"no target {targets - known}"
        return
    if (ran := module_of(words)) is None:
        return
    module, rest = ran
    if module.split(".")[0] not in ("bt", "launchers"):
        return
    assert importlib.util.find_spec(module), f"no module {module}"
    if module in ("bt.train", "bt.evaluate", "bt.convert", "launchers"):
        check_options(module, rest)
    if module not in ("bt.train", "bt.evaluate", "bt.convert", "bt.smoke"):
        code = sources_of(module)
        if rest and re.fullmatch(r"[a-z_]+", rest[0]):
            assert re.search(rf"\b{rest[0]}\b", code), f"{module} has no {rest[0]}"
        for option in (word.partition("=")[0] for word in rest if re.match(r"--\w", word)):
            assert f'"{option}"' in every_source(), f"no program has {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_what_the_programs_take(page):
    for words in commands(page):
        try:
            check_command(words)
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


def test_wrong_commands_are_found():
    wrong = """
    make demos
    python -m bt.trainer experiment=vqa_base
    python -m bt.train experiment=vqa_base trainer.micro=3
    python -m bt.train -m experiment=vqa_base,vqa_bose
    python -m bt.convert source=coco
    python -m launchers submitt
    python -m bt.sync --run DIR
    """
    for line in wrong.strip().splitlines():
        with pytest.raises(Exception):  # noqa: B017  # each in its own way
            check_command(line.split())
    readme = commands(ROOT / "README.md")
    assert ["make", "demo"] in readme and ["python", "-m", "bt.train", "experiment=pretrain_base"] in readme


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_recipes_is_that_of_the_configuration():
    made = load("docs/recipes_table.py")
    assert made.MARKS.search((ROOT / "docs/recipes.md").read_text())[0] == made.table(recipe)


def test_the_picture_is_what_its_script_draws(tmp_path):
    committed = ROOT / "docs/architecture.png"
    load("docs/architecture.py").draw(tmp_path / "drawn.png")
    with Image.open(committed) as old, Image.open(tmp_path / "drawn.png") as new:
        near = [abs(a - b) <= 0.05 * a for a, b in zip(old.size, new.size, strict=True)]  # fonts differ a little
        difference = ImageChops.difference(old.convert("L"), new.convert("L").resize(old.size))
    assert all(near) and ImageStat.Stat(difference).mean[0] < 5 and committed.stat().st_size < 100_000


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["version"] == version
        and citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2206.08657"
    )
    assert re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install -e '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= pages
    tower = (tmp_path / "site/api/bt.models.html").read_text()
    assert 'id="bt.models.bridgetower.BridgeTower.fuse"' in tower
    assert "The projection of each modality is shared by all bridged layers." in tower
    assert 'href="data.html' in (tmp_path / "site/index.html").read_text()
