"""The layout that CONTRIBUTING promises: imports run one way, and a backend's name stands in the registry alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import swl
from swl.backends.registry import _REGISTRY

PACKAGE = Path(swl.__file__).parent
LEVELS = [
    ("errors", "options"),
    ("backends",),
    ("ops",),
    ("nn", "functional"),
    ("torch", "jax", "sklearn", "distributed"),
    ("warmup", "bench", "demos"),
    ("cli", "__main__"),
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
MODULES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.Module) -> Iterator[str]:
    """Name every module that is imported anywhere in a file, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_level() -> None:
    parts = {path.parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert parts == set(LEVEL)


def test_imports_run_one_way() -> None:
    """cli, demos, bench → torch, jax, distributed → nn → ops → backends."""
    upwards = []
    for path, tree in MODULES.items():
        if path.name == "__init__.py" and len(path.parts) == 1:
            continue  # what users import comes from everywhere
        here = LEVEL[path.parts[0].removesuffix(".py")]
        for name in imported(tree):
            package, _, rest = name.partition(".")
            if package != "swl":
                continue
            target = rest.partition(".")[0]
            # what is not a module of the package is a name of `swl` itself, which only programs may use
            level = LEVEL.get(target, len(LEVELS) - 2)
            if level > here:
                upwards.append(f"{path} imports {name}")
    assert not upwards


def test_backends_know_only_each_others_module() -> None:
    """CUDA's knows nothing of Numba's, and what the hosts share knows neither."""
    for path, tree in MODULES.items():
        if path.parts[:2] in (("backends", "cupy"), ("backends", "host")):
            others = [n for n in imported(tree) if n.startswith(("swl.backends.numba", "swl.backends.cupy"))]
            assert all(n.startswith("swl.backends." + path.parts[1]) for n in others), path


def test_no_backends_name_stands_outside_the_registry() -> None:
    allowed = {Path("cli/info.py")}  # packages whose versions are printed
    found = [
        f"{path}:{node.lineno} {node.value!r}"
        for path, tree in MODULES.items()
        if path.parts[0] != "backends" and path not in allowed
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in _REGISTRY
    ]
    assert not found


def test_dir_shows_what_users_import() -> None:
    public = [name for name in dir(swl) if not name.startswith("__")]
    assert public == sorted(swl.__all__)
    assert all(hasattr(swl, name) for name in public)
