"""Rules of the house: imports go one way, heavy libraries stay out of the way, experiments and the README run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# the reading order: a module may import only what stands before it
ORDER = (
    "errors operators attention_layout blocks token_tables weight_axes structure own_blocks adam_mini_names partition "
    "param_groups memory precision problem imagined recompute verification plan "
    "double_backward trials gradient_graph linear_program tangent_rules linearised linear_route engine hessian lanczos "
    "probes quadrature density comparison verdict heterogeneity growing adaptive "
    "matrix_file dense block_draws coupling conditioning block_mass mass_probing partition_verdict "
    "partition_suggestion tables partition_report partition_check "
    "quadratic.problems quadratic.cases quadratic.methods quadratic.preconditioning quadratic.simulation "
    "quadratic.sweeps quadratic.theory quadratic.lineup quadratic.__init__ "
    "vision networks data zoo results runs plotting partition_plotting "
    "quadratic_plotting network_options report partition_text partition_command quadratic_command cli __init__ __main__"
).split()
# heavy libraries, each imported inside functions in the one module named, and plotting by the command line
LAZY = {"zoo": {"transformers"}, "vision": set(), "data": {"tokenizers", "PIL"}, "cli": {"hessian_tools.plotting"},
        "partition_command": {"hessian_tools.partition_plotting"},
        "quadratic_command": {"hessian_tools.quadratic_plotting"},
        "operators": {"scipy.sparse.linalg"}}  # fmt: skip
FOLDERS = ("hessian_tools", "experiments", "figures", "tests", "benchmarks")
PACKAGE = ROOT / "hessian_tools"
MODULES = {  # by dotted name inside the package
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
}


def imported(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "hessian_tools"
                else [node.module]
            )
            found += [(name, node) for name in names]
    return found


def place(name: str) -> int:
    """Where the module or package ``hessian_tools.x.y`` stands in ORDER."""
    inside = name.removeprefix("hessian_tools.")
    return ORDER.index(inside if inside in ORDER else f"{inside}.__init__")


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_up_the_page(module):
    typing_only = {
        id(inner)
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for name, node in imported(MODULES[module]):
        if name.startswith("hessian_tools.") and id(node) not in typing_only:
            assert place(name) < ORDER.index(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", ORDER)
def test_imports_inside_functions_are_the_heavy_ones(module):
    functions = [n for n in ast.walk(MODULES[module]) if isinstance(n, ast.FunctionDef)]
    inner = {name for function in functions for name, _ in imported(function)}
    assert inner <= LAZY.get(module, set())


def test_import_loads_nothing_heavy():
    heavy = {"torchvision", "transformers", "matplotlib", "tokenizers", "PIL"}
    loaded = run(sys.executable, "-c", "import sys, hessian_tools; print(*sys.modules)").split()
    assert "torch" in loaded and not heavy & set(loaded)


def test_no_file_is_named_after_nothing():
    nothing = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if path.stem in nothing]


EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("*.py") if "--smoke" in path.read_text())


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_experiments_run_and_their_figures_draw(script, tmp_path):
    run(sys.executable, f"experiments/{script}", "--smoke", "--out", str(tmp_path))
    figure = ROOT / "figures" / script
    assert (tmp_path / "result.json").exists()
    if figure.exists():
        run(sys.executable, str(figure), str(tmp_path / "result"), str(tmp_path / "figure.png"))
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_has_examples():
    assert readme_blocks()


@pytest.mark.parametrize("number", range(len(readme_blocks())))
def test_readme_examples_run(number, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(readme_blocks()[number])
    run(sys.executable, str(path), cwd=tmp_path)


def run(*command: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning:hessian_tools"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
