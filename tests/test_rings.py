# SPDX-License-Identifier: Apache-2.0
"""The pack's architecture, checked on its source: which ring may import what, and the rules a linter cannot express."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from pathlib import Path

from nvfp4_video.tests.support.source import ROOT, imported, pack_files, ring_of, tracked_files, tree

RINGS = ("kernels", "checkpoint", "measure", "draw", "samples", "host", "nodes")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "measure": {"measure", "kernels"},
    "checkpoint": {"checkpoint", "measure", "kernels"},
    "draw": {"draw", "checkpoint", "measure", "kernels"},
    "samples": {"samples", "checkpoint", "measure", "kernels"},
    "host": {"host", "draw", "samples", "checkpoint", "measure", "kernels"},
    "nodes": {"nodes", "host", "draw", "checkpoint", "measure", "kernels"},
    "__init__": {"nodes", "host"},
    "__main__": {"cli"},
    "cli": {"cli", "host", "draw", "samples", "checkpoint", "measure", "kernels", "benchmarks", "tests"},
    "benchmarks": {"benchmarks", "host", "draw", "samples", "checkpoint", "measure", "kernels"},
}
# Ring -> its wings, each of which may import those before it.
WINGS = {
    "checkpoint": ("file", "identify", "write", "verify"),
    "host": (
        *("residency", "files", "border", "compute", "decode", "load"),
        *("doctor", "show", "guard", "making", "planning", "bench"),
    ),
}
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfy_kitchen",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
}
SOURCE_SUFFIXES = {".py", ".js", ".md", ".toml", ".txt", ".json"}


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, first name below the repository root or of the absolute module, whether relative) of every import."""
    return [(line, parts[0], relative) for line, parts, relative in imported(path)]


def test_imports_inside_the_pack_go_only_rightwards():
    wrong = [
        f"{path}:{line} imports {name}"
        for path in pack_files()
        for line, name, relative in imports(path)
        if relative and name not in MAY_IMPORT.get(ring_of(path), set())
    ]
    assert wrong == []


def test_imports_between_the_wings_of_a_ring_go_only_one_way():
    wrong = [
        f"{path}:{line} imports {'.'.join(parts)}"
        for path in pack_files()
        if (wings := WINGS.get(ring_of(path))) and path.name != "__init__.py"
        for line, parts, relative in imported(path)
        if relative and parts[0] == ring_of(path)
        if wings.index(parts[1]) > wings.index(path.with_suffix("").parts[1])
    ]
    assert wrong == []


def test_every_file_of_a_ring_with_wings_is_in_one_and_every_wing_has_files():
    for ring, wings in WINGS.items():
        found = {path.with_suffix("").parts[1] for path in pack_files() if ring_of(path) == ring}
        assert found == {*wings, "__init__"}


def test_imports_inside_the_pack_are_relative():
    # Benchmarks are scripts: they alias the repository the way tests/conftest.py does.
    own = {*RINGS, "benchmarks", "tests", "nvfp4_video"}
    wrong = [
        f"{path}:{line} imports {name}"
        for path in pack_files()
        if ring_of(path) != "benchmarks"
        for line, name, relative in imports(path)
        if not relative and name in own
    ]
    assert wrong == []


def test_only_nodes_and_host_know_comfyui():
    # The root __init__.py needs comfy_api's ComfyExtension; benchmarks may measure the host itself.
    exempt = {"nodes", "host", "__init__", "benchmarks"}
    wrong = [
        f"{path}:{line} imports {name}"
        for path in pack_files()
        if ring_of(path) not in exempt
        for line, name, relative in imports(path)
        if not relative and name in HOST_MODULES
    ]
    assert wrong == []


def test_every_file_of_the_pack_belongs_to_a_ring():
    assert [str(path) for path in pack_files() if ring_of(path) not in MAY_IMPORT] == []


def test_no_python_file_exceeds_400_lines_and_node_files_stay_under_120():
    def limit(path: Path) -> int:
        return 119 if path.parts[0] == "nodes" else 29 if path == Path("__init__.py") else 400

    files = [path for path in tracked_files() if path.suffix == ".py"]
    lines = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in files}
    assert {str(path): count for path, count in lines.items() if count > limit(path)} == {}


def test_only_the_command_line_and_benchmarks_print():
    wrong = [
        f"{path}:{node.lineno}"
        for path in pack_files()
        if ring_of(path) not in {"__main__", "benchmarks"}
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert wrong == []


def test_nothing_is_left_to_do_and_no_path_of_a_machine_is_in_the_source():
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b|(?<![\w.])/(home|root|work|Users)/")
    wrong = [
        f"{path}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        if path.suffix in SOURCE_SUFFIXES and path != Path("tests/test_rings.py")
        for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1)
        if unfinished.search(line)
    ]
    assert wrong == []


def test_node_ids_are_literals_in_classes_that_comfyui_manager_recognises():
    # ComfyUI-Manager finds nodes by reading the source: a base spelled io.ComfyNode, a literal node_id in io.Schema.
    wrong = []
    for path in (path for path in pack_files() if path.parts[0] == "nodes"):
        classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
        for node in classes:
            schemas = [c for c in ast.walk(node) if isinstance(c, ast.Call) and ast.unparse(c.func) == "io.Schema"]
            ids = [k.value for c in schemas for k in c.keywords if k.arg == "node_id"]
            literal = len(ids) == 1 and isinstance(ids[0], ast.Constant)
            if [ast.unparse(base) for base in node.bases] != ["io.ComfyNode"] or not literal:
                wrong.append(f"{path}:{node.lineno} {node.name}")
    assert wrong == []


def test_the_entry_point_offers_nodes_with_unique_ids_in_the_pack_s_category(pack, stub_comfy):
    extension = asyncio.run(pack.comfy_entrypoint())
    schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
    ids = [schema.node_id for schema in schemas]
    assert "NVFP4ModelLoader" in ids
    assert len(set(ids)) == len(ids)
    assert {schema.category.split("/")[0] for schema in schemas} == {"NVFP4"}
    assert Path(ROOT, pack.WEB_DIRECTORY).is_dir()


def test_every_node_has_a_help_page(pack, stub_comfy):
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    pages = {path.stem for path in Path(ROOT, pack.WEB_DIRECTORY, "docs").glob("*.md")}
    assert {node.GET_SCHEMA().node_id for node in nodes} - pages == set()


def imported_with(paths: list[Path], unwanted: set[str], *folders: Path) -> list[str]:
    """Which of ``unwanted`` a process has that imports these files of the pack and has ``folders`` on its path."""
    modules = [".".join(("nvfp4_video", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    assert modules
    script = f"""
import importlib, sys, types
sys.path += {[str(folder) for folder in folders]!r}
package = types.ModuleType("nvfp4_video")
package.__path__ = [{str(ROOT)!r}]
sys.modules["nvfp4_video"] = package
for name in {modules!r}:
    importlib.import_module(name)
print(*(name for name in {sorted(unwanted)!r} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


def test_the_inner_rings_import_without_triton_opencv_or_comfyui():
    rings = {"kernels", "checkpoint", "measure", "samples"}
    paths = [path for path in pack_files() if ring_of(path) in rings and "triton" not in path.parts]
    assert imported_with(paths, HOST_MODULES | {"triton", "cv2", "matplotlib", "av"}) == []


def test_loading_computing_and_decoding_import_without_the_web_server():
    # Scripts and the command line use them in processes that have no server, nor what it needs.
    wings = WINGS["host"][: WINGS["host"].index("show")]
    paths = [path for path in pack_files() if ring_of(path) == "host" and path.with_suffix("").parts[1] in wings]
    assert imported_with(paths, {"server", "aiohttp"}, ROOT / "tests" / "stub_comfy") == []
