# SPDX-License-Identifier: Apache-2.0
"""The help pages below web/docs, which the front end opens from a node: complete, of today's schemas, no dead links.

That every node has a page is in test_rings.py. CONTRIBUTING.md and CHANGELOG.md must name what there is, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from nvfp4_video.nodes import NODES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
IDS = [node.GET_SCHEMA().node_id for node in NODES]
TEXTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted(ROOT.glob("docs/*.md"))]
# [text](target) and ![text](target); a target may be followed by a title.
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")


@pytest.fixture
def schemas(stub_comfy) -> dict:
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in NODES)}


def page(node_id: str) -> str:
    return (DOCS / f"{node_id}.md").read_text(encoding="utf-8")


def mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


@pytest.mark.parametrize("node_id", IDS)
def test_every_input_and_output_says_what_it_is_for(node_id: str, schemas):
    schema = schemas[node_id]
    assert [port.id for port in (*schema.inputs, *schema.outputs) if not port.tooltip] == []


def test_every_page_belongs_to_a_node():
    # A page for one language would be <node id>/<language>.md.
    named = {path.relative_to(DOCS).parts[0].removesuffix(".md") for path in DOCS.rglob("*.md")}
    assert sorted(named - set(IDS)) == []


@pytest.mark.parametrize("node_id", IDS)
def test_a_page_begins_with_the_name_that_the_node_shows(node_id: str, schemas):
    assert page(node_id).splitlines()[:2] == [f"# {schemas[node_id].display_name}", ""]


@pytest.mark.parametrize("node_id", IDS)
def test_a_page_names_every_input_and_every_output(node_id: str, schemas):
    ports = [port.id for port in schemas[node_id].inputs]
    ports += [port.display_name or port.io_type for port in schemas[node_id].outputs]
    assert [name for name in ports if not mentions(page(node_id), name)] == []


@pytest.mark.parametrize("node_id", IDS)
def test_a_page_says_how_each_choice_of_a_short_list_differs(node_id: str, schemas):
    # Files, GPUs, recipes and dialects are too many to explain on each page.
    for port in schemas[node_id].inputs:
        choices = getattr(port, "options", None) or []
        if 2 <= len(choices) <= 4:
            text = page(node_id).lower()
            assert [choice for choice in choices if not mentions(text, choice.lower())] == [], port.id


@pytest.mark.parametrize("node_id", IDS)
def test_pictures_lie_beside_the_pages_and_other_links_leave_the_server(node_id: str):
    # The front end reads a relative target from /extensions/<folder of the pack>/docs/, and shows no other file of it.
    for target in LINK.findall(page(node_id)):
        assert target.startswith("https://") or (DOCS / target).is_file(), target


def test_no_picture_is_left_over():
    # The README and docs/ show some of them as well.
    texts = [page(node_id) for node_id in IDS] + [path.read_text(encoding="utf-8") for path in TEXTS]
    shown = {Path(target).name for text in texts for target in LINK.findall(text)}
    assert sorted({path.name for path in (DOCS / "images").iterdir()} - shown) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_of_the_readme_and_of_docs_lead_somewhere(path: Path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        goal = path.parent / unquote(name) if name else path
        assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), target


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_the_readme_is_read_in_a_few_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = re.findall(r"[A-Za-z0-9][\w.,'-]*", re.sub(r"\]\([^)]*\)", "]", text))
    assert len(words) < 720, "what is more than an overview belongs into docs/"


@pytest.mark.parametrize("path", [*TEXTS, *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_texts_call_a_node_by_the_name_it_shows(path: Path, schemas):
    text = " ".join(path.read_text(encoding="utf-8").split())
    for name in (schema.display_name for schema in schemas.values()):
        start, rest = " ".join(name.split()[:2]), "".join(f" {word}" for word in name.split()[2:])
        assert re.findall(rf"{start}\b(?!{rest}\b).{{20}}", text) == [], name


def test_files_and_names_in_contributing_md_exist():
    quoted = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    paths = {word for word in quoted if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+", word)}
    names = {word for word in quoted if re.fullmatch(r"_\w+|[A-Z][A-Z_]+", word)}
    files = [*ROOT.glob("[!.]*/**/*.py"), ROOT / "Makefile", *ROOT.glob(".github/workflows/*.yml")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert sorted(path for path in paths if not any(ROOT.glob(path))) == []
    assert sorted(name for name in names if not mentions(source, name)) == []
    read = {"checkpoint/identify/dialects.py", "checkpoint/write/recipes.py", "checkpoint/identify/vae_signatures.py"}
    assert read <= paths
    assert {"DIALECTS", "RECIPES", "_ROWS"} <= names


def test_the_changelog_begins_with_the_version_in_pyproject_toml():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.group(1) == version.group(1)
