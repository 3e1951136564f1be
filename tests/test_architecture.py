"""The dependency rule of docs/design.md: a module imports only from lower levels, or its own folder."""

import ast
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "distopt"

# Module or folder -> level. What is not named here has no place in the design yet.
_LEVELS = {
    "errors": 0,
    "dlpack": 0,
    "signals": 0,
    "backend": 1,
    "counter_random": 2,
    "schedules": 3,
    "elementwise": 2,
    "variables": 2,
    "tape": 3,
    "constraints": 3,
    "regularizers": 3,
    "initializers": 3,
    "communicators": 3,
    "scopes": 4,
    "ops": 4,
    "aggregators": 4,
    "transforms": 4,
    "optimizers": 5,
    "summaries": 5,
    "layers": 5,
    "losses": 5,
    "data": 5,
    "testing": 5,
    "models": 6,
    "checkpoint": 6,
    "metrics": 6,
    "replica": 6,
    "evaluation": 7,
    "settings": 6,
    "exchange": 7,
    "command_options": 8,
    "step": 7,
    "ranks": 7,
    "manifest": 6,
    "decisions": 7,
    "drift": 6,
    "timeline": 6,
    "trainer": 8,
    "doctor": 8,
    "bench": 9,
    "cli": 10,
    "__init__": 10,
    "__main__": 11,
}
_MAY_IMPORT = {
    "cupy": ("backend",),
    "mpi4py": ("communicators/mpi",),
}
_FILES = sorted(_PACKAGE.rglob("*.py"))


def _imports(path):
    """Yield the name of every module that a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "distopt":
                for alias in node.names:
                    yield f"distopt.{alias.name}"
            else:
                yield node.module


def _unit(module):
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("path", _FILES, ids=lambda p: str(p.relative_to(_PACKAGE)))
def test_a_module_imports_only_from_lower_levels(path):
    relative = path.relative_to(_PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    assert own in _LEVELS, f"{relative} has no level; docs/design.md says where things belong"
    for module in _imports(path):
        if module == "distopt" or module.startswith("distopt."):
            other = _unit(module)
            assert other == own or _LEVELS[other] < _LEVELS[own], f"{relative} imports {module}"


@pytest.mark.parametrize("library", _MAY_IMPORT)
def test_a_library_is_imported_only_where_it_may_be(library):
    users = {
        path.relative_to(_PACKAGE).with_suffix("").as_posix()
        for path in _FILES
        if any(module.partition(".")[0] == library for module in _imports(path))
    }
    assert [user for user in users if not user.startswith(_MAY_IMPORT[library])] == []


def test_there_are_no_cycles_between_modules():
    modules = {_name(path): set(_own_imports(path)) for path in _FILES}
    left = dict(modules)
    while free := [name for name, needs in left.items() if not needs & (left.keys() - {name})]:
        for name in free:
            del left[name]
    assert left == {}


def _name(path):
    parts = ["distopt", *path.relative_to(_PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _own_imports(path):
    """Return what `path` imports when it is itself imported (not inside functions)."""
    names = {_name(p) for p in _FILES}
    body = ast.parse(path.read_text()).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in names:
                    yield inner
                elif node.module in names:
                    yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
