"""The site: ``pip install '.[docs]' && sphinx-build -W docs site``. Nothing is fetched, and no peer need be installed."""

import ast
import sys
from pathlib import Path
from typing import Any

import swl
from swl.options import DEFAULTS

project = "swl"
author = copyright = "the swl authors"
version = release = swl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"swl {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks ship with their output; tests/test_site.py runs them

default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = napoleon_use_rtype = False  # or the C of "shape (N, C)" becomes a link
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["cupy", "jax", "mpi4py", "scipy", "sklearn", "torch"]  # also where they are: one site for all


def table_of_options() -> str:
    """Return a table of all options of a loss, from what stands beside each in ``swl/options.py``."""
    tree = ast.parse((Path(swl.__file__).parent / "options.py").read_text(encoding="utf-8"))
    (options,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options")
    lines = ["| option | default | what it does |", "| --- | --- | --- |"]
    for field, about in zip(options.body, options.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(field.target, ast.Name)
            assert isinstance(about, ast.Expr)
            assert isinstance(about.value, ast.Constant)
            name, text = field.target.id, " ".join(str(about.value.value).replace("``", "`").split())
            lines.append(f"| `{name}` | `{getattr(DEFAULTS, name)!r}` | {text} |")
    return "\n".join(lines)


myst_substitutions: dict[str, Any] = {"options": table_of_options()}


def setup(app: Any) -> None:
    """Cure what configuration does not reach."""
    from sphinx.ext.autodoc.mock import _MockModule
    from sphinx.ext.napoleon.docstring import NumpyDocstring

    def without_last_blank_line(app: Any, page: str, source: list[str]) -> None:
        source[0] = source[0].replace("\n\n```\n", "\n```\n")  # where doctest needs one after the expected output

    app.connect("source-read", without_last_blank_line)

    # Of "the weights: as given", Napoleon would take the first half for a type
    NumpyDocstring._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))

    # `swl.torch` takes a method from the base of this class, so the torch that autodoc imagines needs a real one
    for name in ("torch", "torch.autograd"):
        sys.modules[name] = _MockModule(name)
    sys.modules["torch"].autograd = sys.modules["torch.autograd"]
    sys.modules["torch.autograd"].Function = type("Function", (type("Base", (), {"apply": None}),), {})
