r"""The rooms of the package know only rooms before them. `pytest tests/test_rooms.py -s` prints
what each knows."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pyg_attnpool

ROOT = Path(pyg_attnpool.__file__).parent

# Data flows from the first to the last.
ROOMS = [
    "files",
    "units",
    "arguments",
    "ops",
    "mapping",
    "mesh",
    "nn",
    "models",
    "datasets",
    "metrics",
    "training",
    "latent",
    "fitting",
    "onnx_solvers",
    "export",
    "integrations",
    "visualize",
    "__init__",
    "cli",
]

# The methods of a morphable model that are one line each: they import their room when called.
FORWARD = {
    ("models.morphable", room)
    for room in ("export", "fitting", "latent", "metrics", "training", "visualize")
}
# The version, which a report tells.
FORWARD.add(("visualize.report", "__init__"))
# A mapping reads these of PyTorch's sparse tensors. Pooling layers stand in for such a tensor.
ALLOWED = {("mapping", "_indices"), ("mapping", "_values")}


def test_every_room_has_its_place():
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__pycache__", "csrc", "pretrained"} == set(ROOMS)


def test_rooms_know_only_rooms_before_them():
    known: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, other, later in _imports():
        room, before = name.split(".")[0], other.split(".")[0]
        if room not in known or room == before:
            continue
        known[room].add(before)
        if not (later and (name, before) in FORWARD):
            assert ROOMS.index(before) < ROOMS.index(room), f"{name} imports {other}"
    for room in ROOMS:
        print(f"{room:12} knows {', '.join(sorted(known[room], key=ROOMS.index)) or 'none'}")


def test_modules_import_each_other_without_circles():
    arrows: dict[str, set[str]] = {}
    for name, other, later in _imports():
        if not later:
            arrows.setdefault(name, set()).add(other)
    list(TopologicalSorter(arrows).static_order())  # raises CycleError


def test_no_room_reads_a_private_name_of_another():
    owners: dict[str, set[str]] = {}  # the rooms that define a name
    reads: list[tuple[str, str]] = []
    for path in ROOT.rglob("*.py"):
        name = _name(path)
        owners.setdefault(path.stem, set()).add(name.split(".")[0])
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            defined, read = _defined_and_read(node)
            for other in filter(_is_private, defined):
                owners.setdefault(other, set()).add(name.split(".")[0])
            reads += [(name, other) for other in filter(_is_private, read)]
    # A name that no room defines is one of a library.
    reached = {(name, other) for name, other in reads if other in owners}
    reached = {(name, other) for name, other in reached if name.split(".")[0] not in owners[other]}
    assert reached == ALLOWED


def _defined_and_read(node: ast.AST) -> tuple[list[str], list[str]]:
    # Names that a node defines, and those that it reads from an object or a module. A subclass may
    # read what it has inherited.
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name], []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id], []
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
        return [node.attr] if isinstance(node.ctx, ast.Store) else [], []
    if isinstance(node, ast.Attribute):
        return [], [node.attr]
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyg_attnpool"):
        return [], [*node.module.split("."), *(alias.name for alias in node.names)]
    return [], []


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _imports() -> Iterator[tuple[str, str, bool]]:
    # Importing module, imported module, and whether importing the one leaves the other alone.
    names = {_name(path): path for path in ROOT.rglob("*.py")}
    for name, path in names.items():
        pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text("utf-8")), False)]
        while pending:
            node, later = pending.pop()
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"relative import in {name}"
                module = node.module or ""
                for alias in node.names:
                    other = f"{module}.{alias.name}".removeprefix("pyg_attnpool.")
                    if not module.startswith("pyg_attnpool"):
                        continue
                    yield name, other if other in names else _short(module), later
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("pyg_attnpool."):
                        yield name, _short(alias.name), later
            later |= isinstance(node, ast.FunctionDef) or _for_types(node)
            pending += [(child, later) for child in ast.iter_child_nodes(node)]


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def _short(module: str) -> str:
    return module.removeprefix("pyg_attnpool").removeprefix(".") or "__init__"
