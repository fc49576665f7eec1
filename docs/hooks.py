"""What mkdocs.yml leaves to code: README and its like as pages, a page of docstrings for each package, navigation.

Pages of docs/ need no entry anywhere: those of ORDER come in its order, all others behind them by name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Files of the repository's root that are pages: where they stand in the site.
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ORDER = """
concepts recipes data using checkpoints scaling slurm ablation performance extending differences troubleshooting
""".split()
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def packages() -> dict[str, list[str]]:
    """Package -> its public modules, of `bt`. `__init__` counts where it holds something."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "bt").rglob("*.py")):
        if path.stem == "__main__" or (path.stem == "__init__" and len(path.read_text().splitlines()) < 3):
            continue
        folder = ".".join(path.parent.relative_to(ROOT).parts)
        found.setdefault(folder, []).append(folder if path.stem == "__init__" else f"{folder}.{path.stem}")
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    folder = Path(config.docs_dir)
    pages = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.md")}
    ordered = [name for name in ORDER if name in pages] + sorted(pages - set(ORDER))
    config.nav = [
        {"Home": "index.md"},
        {"Guide": [f"{name}.md" for name in ordered]},
        {"Reference": [{package: f"api/{package}.md"} for package in packages()]},
        {"Project": ["contributing.md", "changelog.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ROOT_PAGES.items():
        text = relink((ROOT / source).read_text(encoding="utf-8"), "", page)
        files.append(File.generated(config, page, content=text))
    for package, modules in packages().items():
        blocks = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"api/{package}.md", content=f"# {package}\n\n{blocks}\n"))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    return markdown if page.file.generated_by else relink(markdown, "docs", page.file.src_uri)


def relink(text: str, folder: str, page: str) -> str:
    """Relative links of a file in `folder` of the repository as links of the site's `page`.

    A link to a file that is no page (code, configuration) becomes its text.
    """

    def site_link(match: re.Match[str]) -> str:
        mark, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            place = path.removeprefix("docs/")
        elif path in ROOT_PAGES:
            place = ROOT_PAGES[path]
        else:
            return words if (ROOT / path).exists() else match[0]
        return f"{mark}[{words}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(site_link, text)
