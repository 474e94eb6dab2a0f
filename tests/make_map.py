# SPDX-License-Identifier: Apache-2.0
"""Draw the map of the pack, docs/map.svg: its folders, what each is for, and which imports which.

usage: python tests/make_map.py

Nothing is written by hand: a box is a folder with the first sentence of its ``__init__.py``; an arrow is an import
between two folders. Every arrow points down, and one that a path of others implies is left out. Folders that import
each other share a box.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from functools import cache
from html import escape
from pathlib import Path

TARGET = Path("docs") / "map.svg"
LEFT_OUT = {"benchmarks"}
WIDE, TALL, GAP, DROP, LETTERS = 250, 104, 20, 62, 31
STYLE = """text{font:13px sans-serif;fill:#20242c} .name{font-weight:bold;font-size:15px}
path{fill:none;stroke:#69707c} .box{fill:#eef2f8;stroke:#1f67b2}"""


def folder_of(parts: tuple[str, ...], root: Path) -> str | None:
    """Parts of an imported name -> the folder of the module, or None if it is none of the pack's."""
    while parts and not (root.joinpath(*parts).is_dir() or root.joinpath(*parts).with_suffix(".py").is_file()):
        parts = parts[:-1]
    folder = parts if root.joinpath(*parts).is_dir() else parts[:-1]
    return "/".join(folder) or None


@cache
def arrows() -> dict[str, set[str]]:
    """Folder -> the folders that its files import."""
    from nvfp4_video.tests.support.source import ROOT, imported, pack_files

    found: dict[str, set[str]] = {}
    for path in pack_files():
        folder = path.parent.as_posix()
        if len(path.parts) > 1 and path.parts[0] not in LEFT_OUT:
            targets = {folder_of(parts, ROOT) for _, parts, relative in imported(path) if relative}
            found.setdefault(folder, set()).update(targets - {None, folder})
    return {folder: targets & found.keys() for folder, targets in found.items() if targets or folder_has_code(folder)}


def folder_has_code(folder: str) -> bool:
    """Whether a folder holds modules, beside the file that makes it a package."""
    from nvfp4_video.tests.support.source import ROOT

    return len(list((ROOT / folder).glob("*.py"))) > 1


def reached(graph: dict, start: object) -> set:
    """All that can be reached from ``start`` by one arrow or more."""
    found, open_ = set(), [start]
    while open_:
        new = graph[open_.pop()] - found
        found |= new
        open_ += new
    return found


def boxes(graph: dict[str, set[str]]) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Folders in a circle put together, and only the arrows that no path of others implies."""
    far = {folder: reached(graph, folder) for folder in graph}
    box = {one: tuple(sorted({one} | {two for two in far[one] if one in far[two]})) for one in graph}
    joined = {name: {box[two] for one in name for two in graph[one]} - {name} for name in box.values()}
    return {
        name: {two for two in near if not any(two in reached(joined, other) for other in near - {two})}
        for name, near in joined.items()
    }


def purpose(folder: str) -> str:
    """First sentence of the docstring of a folder's ``__init__.py``."""
    from nvfp4_video.tests.support.source import ROOT

    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def draw() -> str:
    """-> the SVG."""
    near = boxes(arrows())
    depth: dict[tuple[str, ...], int] = {}

    def level(name: tuple[str, ...]) -> int:
        if name not in depth:
            depth[name] = 1 + max(map(level, near[name]), default=-1)
        return depth[name]

    rows: dict[int, list[tuple[str, ...]]] = {}
    for name in sorted(near):
        rows.setdefault(level(name), []).append(name)
    across = max(map(len, rows.values())) * (WIDE + GAP) + GAP
    down = len(rows) * (TALL + DROP) - DROP + 2 * GAP
    spots = {}
    for number, names in rows.items():
        start = (across - len(names) * (WIDE + GAP) + GAP) / 2
        y = GAP + (max(rows) - number) * (TALL + DROP)
        spots |= {name: (start + index * (WIDE + GAP), y) for index, name in enumerate(names)}
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" width="{across}" height="{down}">']
    lines += [f"<style>{STYLE}</style>", '<rect width="100%" height="100%" fill="white"/>']
    lines += ['<marker id="end" orient="auto" markerWidth="8" markerHeight="8" refX="7" refY="4">']
    lines += ['<path d="M0,1 L7,4 L0,7"/></marker>']
    for one, targets in near.items():
        x, y = spots[one][0] + WIDE / 2, spots[one][1] + TALL
        for u, v in sorted((spots[two][0] + WIDE / 2, spots[two][1]) for two in targets):
            bend = (v - y) / 2
            curve = f"M{x:g},{y:g} C{x:g},{y + bend:g} {u:g},{v - bend:g} {u:g},{v:g}"
            lines.append(f'<path d="{curve}" marker-end="url(#end)"/>')
    for name, (x, y) in spots.items():
        lines.append(f'<rect class="box" x="{x:g}" y="{y:g}" width="{WIDE}" height="{TALL}" rx="6"/>')
        lines.append(f'<text class="name" x="{x + 10:g}" y="{y + 22:g}">{escape(", ".join(name))}</text>')
        for index, text in enumerate(textwrap.wrap(" ".join(map(purpose, name)), LETTERS)[:4]):
            lines.append(f'<text x="{x + 10:g}" y="{y + 42 + 17 * index:g}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Write the picture -> exit status."""
    import conftest

    target = conftest.ROOT / TARGET
    target.parent.mkdir(exist_ok=True)
    target.write_text(draw(), encoding="utf-8")
    sys.stdout.write(f"written: {target}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
