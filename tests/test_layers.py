"""Imports point down (README, "Layers"), and heavy packages load only where they are meant to."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"
LEVELS = [
    {
        "errors",
        "vectors",
        "metrics",
        "template",
        "marks",
        "sentences",
        "stopping",
        "limits",
        "reread",
        "cores",
        "telemetry",
        "seam",
    },
    {
        "teams",
        "rotation",
        "nested",
        "values",
        "filters",
        "plots",
        "storage",
        "parquet",
        "lines",
        "recompute",
        "resident",
        "cosines",
        "margin",
        "cloud",
    },
    {"transform", "html", "predictor", "logs", "listing", "bucket", "section"},
    {"probe", "adaptor", "actor", "verify"},
    {"spec", "store", "docstrings", "tables", "ids", "lock", "ledger"},
    {"sources", "encoders", "placement", "repair", "submit"},
    {"workers"},
    {"rows", "queries", "drift", "views", "merge", "segments"},
    {"embedder", "levels"},
    {"corpus", "embed", "export", "fit", "derive", "index", "cascade", "cache", "training"},
    {"anytime", "hybrid"},
    {"search", "lessons"},
    {"sweep"},
    {"evaluate", "sample"},
    {"querylog", "figures"},
    {"plan", "report", "terminal", "standing"},
    {"run"},
    {"cli"},
]
LEVEL = {module: number for number, level in enumerate(LEVELS) for module in level}
ALLOWED = {
    "ray": {"workers", "submit", "telemetry", "training/distributed"},
    "lancedb": {"index", "search", "store"},
    "lance": {"index", "search", "store", "reread"},
    "faiss": {"resident"},
    "numkong": {"cosines"},
    "torch": {"encoders", "adaptor", "training"},
    "sentence_transformers": {"encoders", "training"},
    "transformers": {"encoders", "training"},
    "huggingface_hub": {"encoders"},
    "openvino": {"encoders"},
    "nncf": {"encoders"},
    "nanotoken": {"encoders"},
    "obstore": {"bucket"},
    "datasets": {"training"},
    "accelerate": {"training"},
}
LATE = {"ray", "lancedb", "faiss", "numkong", "torch", "sentence_transformers", "transformers", "huggingface_hub"} | {
    "openvino", "nncf", "nanotoken", "obstore", "datasets", "accelerate",
}  # fmt: skip
"""Packages that may only be imported inside a function."""


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py",)]


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
        return [f"pipeline.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported name, whether at the top of the module)."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    return [(name, id(node) in top) for node in ast.walk(tree) for name in imported(node)]


def test_every_module_has_a_level():
    assert {module_of(path) for path in files()} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    mine = module_of(path)
    for name, at_top in imports(path):
        package, _, rest = name.partition(".")
        if package == "pipeline" and mine != "__init__":
            other = rest.split(".")[0]
            assert other == mine or LEVEL[other] < LEVEL[mine], f"{mine} imports {other}"
        if package in ALLOWED:
            file = str(path.relative_to(PACKAGE)).removesuffix(".py")
            assert {mine, file} & ALLOWED[package], f"{file} imports {package}"
            assert not (package in LATE and at_top), f"{mine} imports {package} when it is loaded"


def test_every_module_is_in_the_readme():
    readme = (PACKAGE.parent / "README.md").read_text()
    missing = [
        path.name for path in files() if f"`{path.relative_to(PACKAGE)}`" not in readme and path.name != "__init__.py"
    ]
    assert not missing
