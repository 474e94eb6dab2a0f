# SPDX-License-Identifier: Apache-2.0
"""The arguments that several commands on checkpoints have."""

from __future__ import annotations

import argparse

from ..checkpoint.identify.dialects import AUTO, DIALECTS

_SOURCE = "a .safetensors file, its .index.json, one of its shards, or a quoted wildcard"


def add_source(parser: argparse.ArgumentParser, metavar: str = "CHECKPOINT") -> None:
    parser.add_argument("source", metavar=metavar, help=_SOURCE)


def add_dialect(parser: argparse.ArgumentParser, when: str = "") -> None:
    """``when`` it is wanted begins the help."""
    choices = (AUTO, *DIALECTS)
    parser.add_argument("--dialect", choices=choices, default=AUTO, metavar="NAME", help=when + ", ".join(choices))


def add_lora(parser: argparse.ArgumentParser, what: str) -> None:
    """``what`` is done with it."""
    text = f"{what}; several may be named, each by an option of its own; without =STRENGTH at 1"
    parser.add_argument("--lora", type=_lora, action="append", default=[], metavar="FILE=STRENGTH", help=text)


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE=STRENGTH; a file's own name may have an equals sign."""
    file, _, strength = text.rpartition("=")
    try:
        return (file, float(strength)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def add_target(parser: argparse.ArgumentParser, replaced: str) -> None:
    """What is taken from elsewhere, and what may be replaced."""
    parser.add_argument("--config-from", metavar="FILE", help="a checkpoint of the same model, whose `config` is taken")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {replaced}")
