"""Rules of the house: imports go one way, heavy libraries stay out of the way, experiments and the
README run."""

import ast
import graphlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hessian_tools

ROOT = Path(__file__).parent.parent
# the reading order of the folders, and of what lies beside them: each may import only what stands
# before it
ORDER = (
    "interruption errors tables shown lock results problem blocks curvature.tangent "
    "curvature.segments curvature.engine curvature.outputs curvature spectra heterogeneity structure descent "
    "quadratic optimizers training tracking plots page app.models app __init__ __main__"
).split()
# heavy libraries, each imported inside functions in the one module named, and plotting by the
# command line
LAZY = {
    "problem.specs": {"transformers"},
    "problem.data": {"tokenizers", "PIL"},
    "curvature.symmetric": {"scipy.sparse.linalg"},
    "optimizers.named": {"pytorch_optimizer"},
    "tracking.trainers": {"transformers", "lightning"},
    "page.heat_maps": {"PIL"},
    "app.models.saved_model": {"transformers"},
    "app.spectra_command": {"hessian_tools.plots"},
    "app.partition_command": {"hessian_tools.plots"},
    "app.quadratic_command": {"hessian_tools.plots"},
    "app.race_command": {"hessian_tools.plots"},
}
FOLDERS = ("hessian_tools", "experiments", "figures", "tests", "benchmarks")
PACKAGE = ROOT / "hessian_tools"
EXPORTING = (
    "problem blocks curvature spectra heterogeneity structure descent quadratic optimizers "
    "training tracking page"
).split()
MODULES = {  # by dotted name inside the package
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that ``tree`` imports, typing-only imports included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.removeprefix("hessian_tools.") in MODULES}
            names |= modules or {str(node.module)}
    return names


def imports_of(module: str) -> list[str]:
    """The modules of this package that ``module`` imports, without the package's name."""
    inside = [name for name in imported(MODULES[module]) if name.startswith("hessian_tools.")]
    return [name.removeprefix("hessian_tools.") for name in inside]


def place(module: str) -> int:
    """Where the folder of ``module`` (or a module beside the folders) stands in ORDER."""
    home = module if module in ORDER else module.rpartition(".")[0]
    return ORDER.index(home)


def test_every_folder_has_its_place():
    homes = {name if "." not in name else name.rpartition(".")[0] for name in MODULES}
    assert homes == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_the_page(module):
    for name in imports_of(module):
        assert place(name) <= place(module), f"{module} imports {name}"


@pytest.mark.parametrize("folder", ORDER)
def test_no_folder_holds_a_circle(folder):
    inside = {name for name in MODULES if place(name) == ORDER.index(folder)}
    imports = {name: {other for other in imports_of(name) if other in inside} for name in inside}
    list(
        graphlib.TopologicalSorter(imports).static_order()
    )  # raises CycleError, which names the circle


def test_the_tangent_program_has_one_door():
    folder = "curvature.tangent."
    outside = [name for name in MODULES if not name.startswith(folder)]
    used = {name for module in outside for name in imports_of(module) if name.startswith(folder)}
    assert used <= {folder + "route", folder + "graph"}  # graph: the error Untraceable


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_functions_are_the_heavy_ones(module):
    functions = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.FunctionDef)]
    inner = {name for function in functions for name in imported(function)}
    allowed = LAZY.get(module, set())
    assert all(
        any(name == heavy or name.startswith(f"{heavy}.") for heavy in allowed) for name in inner
    ), inner


def test_the_top_holds_about_38_names_and_shadows_no_folder():
    top = hessian_tools.__all__
    assert len(top) == len(set(top)) <= 38
    for name in top:
        value = getattr(hessian_tools, name)
        is_module = isinstance(value, ModuleType)
        assert is_module == (name in MODULES), f"ht.{name} shadows hessian_tools.{name}"


@pytest.mark.parametrize("folder", EXPORTING)
def test_folders_export_public_names_and_shadow_no_module(folder):
    package = importlib.import_module(f"hessian_tools.{folder}")
    for name in package.__all__:
        assert hasattr(package, name)
        assert f"{folder}.{name}" not in MODULES, f"{folder}.{name} shadows a module"


def test_import_loads_nothing_heavy():
    heavy = {"torchvision", "transformers", "matplotlib", "tokenizers", "PIL"}
    loaded = run(sys.executable, "-c", "import sys, hessian_tools; print(*sys.modules)").split()
    assert "torch" in loaded and not heavy & set(loaded)


def test_the_figures_of_the_house():
    """What benchmarks/house.py prints, held to the limits that the package has set itself."""
    spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    figures = house.measured(ROOT)
    assert int(figures["files in the largest folder"]) <= 14
    assert float(figures["tokens a line of code"]) <= 9
    assert int(figures["of complexity above 12"]) == 0
    assert int(figures["lines above 100 columns"]) == 0
    assert int(figures["circles among modules"]) == 0
    assert int(figures["Any"]) < 60


def test_no_file_is_named_after_nothing():
    nothing = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [
        path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if path.stem in nothing
    ]


EXPERIMENTS = sorted(
    path.name
    for path in (ROOT / "experiments").glob("*.py")
    if "--smoke" in path.read_text() and path.stem != "script"
)


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPERIMENTS)
def test_experiments_run_and_their_figures_draw(script, tmp_path):
    run(sys.executable, f"experiments/{script}", "--smoke", "--out", str(tmp_path))
    figure = ROOT / "figures" / script
    assert (tmp_path / "result.json").exists()
    if figure.exists():
        run(sys.executable, str(figure), str(tmp_path / "result"), str(tmp_path / "figure.png"))
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def run(*command: str, cwd: Path = ROOT) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::UserWarning:hessian_tools",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
