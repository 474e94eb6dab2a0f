# SPDX-License-Identifier: Apache-2.0
"""What people have instead of a safetensors file: web pages, pointers, pickles, cut downloads."""

from __future__ import annotations

AGAIN = "download it again"


def what_it_is(head: bytes, most: int) -> tuple[str, str, str]:
    """The beginning of a file whose first 8 bytes are no length of a header, ``most`` -> found, expected, remedy."""
    start = head.lstrip()[:64].lower()
    readable = head.isascii() and all(char.isprintable() or char.isspace() for char in head.decode("ascii"))
    expected = "a safetensors file"
    if start.startswith(b"version https://git-lfs"):
        found, remedy = "this is a git-LFS pointer, not the model", "run `git lfs pull`, or download the file itself"
    elif start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        found, remedy = "this is a web page, not the model", "download the file itself, logged in where that is needed"
    elif readable:
        found = f"this is a text that begins {head.decode('ascii')[:60]!r}"
        remedy = "if a site sent it instead of the model, log in there, accept its terms and download again"
    elif head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        found, remedy = "this is a pickle (.ckpt, .pt), which can run code", "convert it to safetensors first"
    elif head.startswith(b"GGUF"):
        found, remedy = "this is a GGUF file", "choose the safetensors version of the model"
    elif len(head) < 8:
        found, remedy = f"the file is only {len(head)} bytes long", AGAIN
    else:
        found = f"its header claims a length of {int.from_bytes(head[:8], 'little'):,} bytes"
        expected = f"at most {most:,}"
        remedy = "this is not a safetensors file, or a damaged one: download it again"
    return found, expected, remedy
