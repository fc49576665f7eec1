"""`make notebooks`: runs notebooks/ on the runs of a tracking store, and renders them to docs/notebooks/*.html.

python -m bt.report.notebooks                                   # all of them, on mlflow.db here
python -m bt.report.notebooks 01_bridge_ablation SWEEP=my-sweep # one, with a variable of its first code cell changed
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bt.data.shards import write_atomic
from bt.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PARAMETERS = "parameters"  # the tag of the cell whose variables can be changed, as papermill has it
TIMEOUT = 600  # seconds for one cell


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def executed(name: str, parameters: Mapping[str, str], folder: Path) -> Any:
    """The notebook with its outputs. folder: the working directory of its kernel.

    Raises UserError for a variable that the notebook has not, nbclient's CellExecutionError where a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ())]
    source = notebook.cells[place].source
    known = [line.split(" = ")[0] for line in source.splitlines() if " = " in line]
    if unknown := set(parameters) - set(known):
        raise UserError(f"{unknown.pop()} is no variable of {name}: it has {', '.join(known)}")
    changed = "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    notebook.cells[place].source = source + changed
    NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # without what libraries say on the side
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def render(notebook: Any, path: Path) -> None:
    """Writes a page without the code's prompts, whole or not at all."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, exporter.from_notebook_node(notebook)[0].encode())


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bt.report.notebooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="NOTEBOOK or NAME=VALUE", help="default: all notebooks")
    parser.add_argument("--out", type=Path, default=Path("docs/notebooks"), metavar="DIR")
    options = parser.parse_args(given)
    parameters = dict(word.split("=", 1) for word in options.words if "=" in word)
    chosen = [word for word in options.words if "=" not in word] or names()
    try:
        if wrong := [name for name in chosen if name not in names()]:
            raise UserError(f"no notebook {wrong[0]}; there are {', '.join(names())}")
        for name in chosen:
            start = time.perf_counter()
            render(executed(name, parameters, Path.cwd()), options.out / f"{name}.html")
            print(f"{options.out / name}.html  {time.perf_counter() - start:.0f} s", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
