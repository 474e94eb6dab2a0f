# SPDX-License-Identifier: Apache-2.0
"""The recorded names, shapes and configurations of real models; tests/record_keys.py writes most of ``data/``."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def recorded(name: str) -> dict[str, Any]:
    """A file of ``data/`` by its name without suffixes."""
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
