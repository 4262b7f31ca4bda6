"""The pages as text: links lead somewhere, code is tested, and the reference misses nothing. `test_site.py` builds them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import swl

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])
FENCED = re.compile(r"^(`{3,})(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
WITHOUT_CODE = {"changelog.md", "cite.md"}
INTERNAL = {"bench", "cli", "demos", "errors", "functional", "nn", "ops", "options", "warmup"}
"""Modules of the package whose names users import from elsewhere, if at all."""


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def text(page: Path) -> str:
    """The Markdown of a page, or of a notebook's cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "code", FENCED.sub("", text(page)))


def anchors(page: Path) -> Iterator[str]:
    """What headings are called in links, as repositories' hosts and MyST have it."""
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *$", FENCED.sub("", text(page)), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        assert there.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_code_is_a_doctest_or_a_command(page: Path) -> None:
    for _, language, code in FENCED.findall(text(page)):
        if language == "python":
            assert code.startswith(">>> "), f"nothing runs this: {code}"
        else:
            assert language.startswith("{") or language in ("sh", "text", "toml"), f"{language!r}: {code}"


def test_every_page_has_a_tested_example() -> None:
    guides = [page for page in DOCS.rglob("*.md") if page.parent.name not in ("api", "decisions")]
    untested = {page.name for page in guides if ">>> " not in page.read_text()}
    assert untested == WITHOUT_CODE


def public(module: str) -> list[str]:
    """The names that a module gives, without importing it."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    (names,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
    )
    return list(ast.literal_eval(names))


def modules() -> list[str]:
    """The modules that users import beside `swl`."""
    parts = {path.stem for path in (ROOT / "swl").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return [f"swl.{part}" for part in sorted(parts - INTERNAL) if not part.startswith("_")]


def test_contributing_says_what_every_part_is() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text()
    parts = [path for path in (ROOT / "swl").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert not [path.name for path in parts if path.name[0] != "_" and f"`swl/{path.name}" not in table]


def test_the_reference_has_every_public_object() -> None:
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    named = re.findall(r"^\.\. auto(?:function|class|exception|data):: (?:swl\.)?(\w+)$", reference, re.MULTILINE)
    assert sorted(named) == sorted(set(named))
    assert set(swl.__all__) == set(named), "docs/api"
    whole = set(re.findall(r"^\.\. automodule:: (\S+)$", reference, re.MULTILINE))
    assert set(modules()) == whole, "docs/api, and its list in docs/index.md"
