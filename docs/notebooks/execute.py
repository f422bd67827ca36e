"""Executes the notebooks beside it, in place: every cell anew, its outputs are what is committed.

    python docs/notebooks/execute.py

What differs from run to run (times, versions, numbers of cells) is not kept, so that a notebook
whose code and results are the same is the same file. A cell that fails stops it, and nothing is
written then. Needs nbformat, nbclient and ipykernel, which the extra ``test`` brings.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SECONDS = 300  # the most for a cell


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        executed = execute(nbformat.read(path, as_version=4))
        nbformat.write(executed, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """``notebook`` with new outputs, computed in a folder that is gone afterwards."""
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name=KERNEL["name"],
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
    nbformat.validate(notebook)
    return notebook


if __name__ == "__main__":
    main()
