# SPDX-License-Identifier: Apache-2.0
"""The pack's source, read and not run: its files, and what each imports."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[Path]:
    """Every file of the repository but those in hidden or generated folders."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if not name.startswith(".") and name != "__pycache__"]
        found += [Path(folder, name).relative_to(ROOT) for name in files]
    return sorted(found)


def pack_files() -> list[Path]:
    """The pack's own Python files, without tests."""
    return [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] != "tests"]


def ring_of(path: Path) -> str:
    """First folder of a file, or the name of a module at the root."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path) -> list[tuple[int, tuple[str, ...], bool]]:
    """(line, parts of the module's name, below the repository root where relative, whether relative) of every import.

    Where a name is imported from a package, it counts as a part: it may be a module.
    """
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split(".")), False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.lineno, tuple(node.module.split(".")), False))
        elif isinstance(node, ast.ImportFrom):
            base = (*path.parts[: len(path.parts) - node.level], *(node.module or "").split("."))
            found += [(node.lineno, (*filter(None, base), alias.name), True) for alias in node.names]
    return found
