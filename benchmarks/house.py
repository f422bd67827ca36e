"""How the code is built, in figures: folders, tokens a line, complexity, ``Any``, circles.

    python benchmarks/house.py [ROOT ...]

prints a column for each checkout, so that two versions can be held against each other. Only
``hessian_tools/`` is counted, and the README. Tokens are those of Python's tokenizer, without
comments, docstrings and layout; lines are those that hold such a token. The cyclomatic complexity
of a function is McCabe's: 1, and 1 for every branch, loop, handler, conditional expression,
comprehension, condition of one, and further operand of ``and`` or ``or``; nested functions count
by themselves.
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.COMMENT,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.comprehension,
    ast.match_case,
)
HIGHEST = 12  # the most complexity that a function may have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("roots", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    roots = parser.parse_args().roots
    columns = [measured(root) for root in roots]
    width = max(len(name) for name in columns[0])
    for name in columns[0]:
        values = "".join(f"{column[name]:>12}" for column in columns)
        print(f"{name.ljust(width)}{values}")


def measured(root: Path) -> dict[str, str]:
    """The figures of the checkout at ``root``, by name."""
    package = root / "hessian_tools"
    files = sorted(package.rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    tokens, code, comments, physical = line_counts(files, trees)
    complexities = [c for tree in trees.values() for c in function_complexities(tree)]
    names = [node.id for tree in trees.values() for node in ast.walk(tree) if is_name(node)]
    statements = sum(isinstance(n, ast.stmt) for tree in trees.values() for n in ast.walk(tree))
    text = "".join(file.read_text() for file in files)
    in_folder = Counter(file.parent for file in files if file.name != "__init__.py")
    return {
        "files": str(len(files)),
        "files in the largest folder": str(max(in_folder.values())),
        "longest file, lines": str(max(len(file.read_text().splitlines()) for file in files)),
        "lines": str(physical),
        "lines of code": str(code),
        "statements": str(statements),
        "tokens": str(tokens),
        "tokens a line of code": f"{tokens / code:.1f}",
        "comments, share of lines": f"{comments / physical:.1%}",
        "lines above 100 columns": str(sum(len(line) > 100 for line in text.splitlines())),
        "# fmt: skip": str(text.count("# fmt: " + "skip")),
        "Any": str(names.count("Any")),
        "functions": str(len(complexities)),
        f"of complexity above {HIGHEST}": str(sum(c > HIGHEST for c in complexities)),
        "of complexity above 15": str(sum(c > 15 for c in complexities)),
        "circles among modules": str(circles(package, trees)),
        "README, bytes": str((root / "README.md").stat().st_size),
        "pages in docs/": str(len(list((root / "docs").rglob("*.md")))),
        "names at the top": str(names_at_the_top(trees[package / "__init__.py"])),
    }


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def line_counts(files: list[Path], trees: dict[Path, ast.Module]) -> tuple[int, int, int, int]:
    """Tokens, lines of code, lines of comments, lines; docstrings are neither code nor tokens."""
    tokens = code = comments = physical = 0
    for file in files:
        docstrings = set(docstring_lines(trees[file]))
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            comments += token.type == tokenize.COMMENT
            if token.type not in LAYOUT and token.start[0] not in docstrings:
                tokens += 1
                lines |= set(range(token.start[0], token.end[0] + 1))
        code += len(lines)
        physical += len(file.read_text().splitlines())
    return tokens, code, comments, physical


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            first = node.body[0]
            yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)


def function_complexities(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield complexity(node)


def complexity(function: ast.AST) -> int:
    """1, and 1 for every decision in ``function``, without those of functions inside."""
    total = 1
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, FUNCTIONS):
            continue
        total += isinstance(node, BRANCHES)
        if isinstance(node, ast.comprehension):
            total += len(node.ifs)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        waiting += ast.iter_child_nodes(node)
    return total


def circles(package: Path, trees: dict[Path, ast.Module]) -> int:
    """How many groups of modules import each other in a circle, typing-only imports included."""
    modules = {dotted(package, file): tree for file, tree in trees.items()}
    imports = {name: imported(tree, set(modules)) - {name} for name, tree in modules.items()}
    reached = {name: reachable(name, imports) for name in imports}
    tied = {frozenset(b for b in reached[a] if a in reached[b]) for a in imports}
    return sum(len(group) > 1 for group in tied)


def dotted(package: Path, file: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner or {node.module}
    return found & known


def reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in imports[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def names_at_the_top(tree: ast.Module) -> int:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


if __name__ == "__main__":
    main()
