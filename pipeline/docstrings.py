"""The corpus `docstrings:stdlib`: docstrings of the Python that runs the job, found by `ast`, never by import."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

MIN_CHARACTERS = 80
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "site-packages"}

Row = dict[str, str]


@lru_cache(maxsize=1)
def stdlib() -> tuple[Row, ...]:
    """Rows `id, title, text, module`, in order of file path, then line; ids are unique.

    `id` is module.qualname, a repeated one gets `@line`; `title` is its last part; `text` is at least 80 characters.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    rows: list[Row] = []
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            for line, name, text in sorted(_docstrings(path)):
                full = f"{module}.{name}" if name else module
                full = f"{full}@{line}" if full in seen else full
                seen.add(full)
                rows.append({"id": full, "title": full.rpartition(".")[2], "text": text, "module": module})
    return tuple(rows)


def stamp() -> str:
    """What the rows depend on: this Python."""
    return f"{sys.implementation.name} {sys.version} {sysconfig.get_paths()['stdlib']}"


def _docstrings(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, qualified name, docstring) of a file; a file that does not parse has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS:
                yield getattr(node, "lineno", 0), name, text
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{name}.{child.name}" if name else child.name, child))
            elif isinstance(child, ast.stmt | ast.excepthandler):
                stack.append((name, child))
