"""The layout that CONTRIBUTING promises: imports run one way, and a backend's name stands in the registry alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import swl
from swl.backends.registry import _REGISTRY
from swl.typing import BackendName

PACKAGE = Path(swl.__file__).parent
LEVELS = [
    ("errors", "options", "typing"),
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
    allowed = {
        Path("cli/info.py"),
        Path("typing.py"),
    }  # versions of packages are printed; type checkers want names spelled out
    assert set(get_args(get_args(BackendName)[0])) == {*_REGISTRY, "auto"} - {"cupy-fake"}
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


def test_nothing_is_written_twice() -> None:
    """No eight lines that are not blank follow one another in two places."""
    places: dict[tuple[str, ...], str] = {}
    for path in MODULES:
        text = (PACKAGE / path).read_text().splitlines()
        lines = [(number, line.strip()) for number, line in enumerate(text, 1) if line.strip()]
        for i in range(len(lines) - 7):
            here = f"{path}:{lines[i][0]}"
            there = places.setdefault(tuple(line for _, line in lines[i : i + 8]), here)
            assert there == here


ANY = {
    "swl.check_gradients(kwargs)": "keyword arguments of whatever function is given",
    "swl.distributed.Checkpoints.load(expect)": "anything that JSON can hold",
    "swl.distributed.Checkpoints.load(return)": "likewise",
    "swl.distributed.Checkpoints.save(extra)": "likewise",
    "swl.distributed.Counted.Iallgatherv(return)": "a request of MPI's or of a transport's",
    "swl.distributed.Counted.Ialltoallv(return)": "likewise",
    "swl.sklearn.LinearClassifier.__init__(class_weight)": "a label is anything that can be hashed",
}
"""Where `Any` is all that can be said of an argument or result, and why."""


def listed(tree: ast.Module) -> set[str]:
    """Return the names in ``__all__``, or else all that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def definitions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Find what the names of a module's ``__all__`` mean, there or in the modules that it takes them from."""
    tree = MODULES[path]
    names = listed(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            yield node.name, node
        elif isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & names:
            origin = Path(*(node.module or "").split(".")[1:])
            found = dict(
                definitions(next(p for p in (origin.with_suffix(".py"), origin / "__init__.py") if p in MODULES))
            )
            yield from ((name, found[name]) for name in names & found.keys() & {alias.name for alias in node.names})


def signatures(name: str, node: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield a function, or the public methods of a class."""
    if isinstance(node, ast.FunctionDef):
        yield name, node
        return
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or method.name[0] != "_"):
            yield f"{name}.{method.name}", method


def says_nothing(annotation: ast.expr | None) -> bool:
    """Tell whether an argument or result is `Any`, or has it as an element."""
    plain = "" if annotation is None else re.sub(r"np.dtype\[Any\]|Callable\[..., Any\]", "", ast.unparse(annotation))
    return "Any" in re.findall(r"\w+", plain)


def test_public_signatures_say_what_they_take() -> None:
    """For arrays and the like `swl.typing` has names."""
    found = {
        f"{function}({argument.arg})"
        for path in MODULES
        if path.parent == Path() or (path.stem == "__init__" and len(path.parts) == 2)
        for name, node in definitions(path)
        for function, tree in signatures(
            ".".join(["swl", *path.with_suffix("").parts, name]).replace(".__init__", ""), node
        )
        for argument in [*ast.walk(tree.args), ast.arg("return", tree.returns)]
        if isinstance(argument, ast.arg) and says_nothing(argument.annotation)
    }
    assert found == set(ANY)
