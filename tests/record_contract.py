# SPDX-License-Identifier: Apache-2.0
"""Records what a real ComfyUI offers under every name that tests/stub_comfy stubs, into tests/stub_comfy/contract.json.

usage: COMFYUI_PATH=<checkout> [COMFYUI_PYTHON=<its python>] python tests/record_contract.py

An entry is a kind, "class", "function", "module" or "value", for the first two with the parameters, those with a
default marked by "=": ``function (sd, model_options=, metadata=)``, for a word with the word: ``value
diffusion_model``. Each run adds or replaces the record of one host version; all but the newest hold only what differs
from the newest, null for a name they lack. The real modules and the stubbed ones have the same names, so this file runs
itself in the host's Python to look at the real ones; there it needs only the standard library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STUB = HERE / "stub_comfy"
CONTRACT = STUB / "contract.json"
MARK = "contract: "

# Methods of classes that a stub module re-exports or that only exist once a factory was called, "()" being the call.
FURTHER_NAMES = (
    "comfy.ops.mixed_precision_ops()._disabled",
    "comfy.ops.mixed_precision_ops()._quant_config",
    "comfy.ops.mixed_precision_ops().Linear",
    "comfy.ops.mixed_precision_ops().Linear._load_from_state_dict",
    "comfy.ops.mixed_precision_ops().Linear.convert_weight",
    "comfy.ops.mixed_precision_ops().Linear.forward",
    "comfy.ops.mixed_precision_ops().Linear.forward_comfy_cast_weights",
    "comfy.ops.mixed_precision_ops().Linear.set_weight",
    "comfy.ops.mixed_precision_ops().Linear.state_dict",
    "comfy.quant_ops.QuantizedTensor.dequantize",
    "comfy.quant_ops.QuantizedTensor.from_float",
    "comfy.quant_ops.TensorCoreNVFP4Layout.Params",
    "comfy_api.v0_0_2.ComfyAPISync().execution.set_progress",
)


def stub_modules() -> list[str]:
    """Dotted names of the stub's modules."""
    paths = sorted(path.relative_to(STUB).with_suffix("") for path in STUB.rglob("*.py"))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def stub_names() -> list[str]:
    """Every public name of the stub, members of its own classes included; ``tests/stub_comfy`` must be on sys.path."""
    names = []
    for module_name in stub_modules():
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            names += _with_members(f"{module_name}.{name}", getattr(module, name))
    return sorted({*names, *FURTHER_NAMES})


def _with_members(name: str, value: Any) -> list[str]:
    names = [name]
    if isinstance(value, type) and value.__module__ in stub_modules():
        for member, found in vars(value).items():
            if not member.startswith("_") and not isinstance(found, value) or _is_enum_member(found, value):
                names += _with_members(f"{name}.{member}", found)
    return names


def _is_enum_member(found: Any, owner: type) -> bool:
    return isinstance(found, str) and isinstance(found, owner)


def describe(name: str) -> str | None:
    """The entry of one name among the modules that this process imports, or None."""
    value = _resolve(name)
    if value is None or isinstance(value, types.ModuleType):
        return value and "module"
    kind = "class" if isinstance(value, type) else "function" if callable(value) else "value"
    if kind == "value" or (kind == "class" and issubclass(value, str)):
        word = getattr(value, "value", value)
        return f"{kind} {word}" if isinstance(word, str) and re.fullmatch(r"[\w*]+", word) else kind
    try:
        return f"{kind} ({_spell(inspect.signature(value))})"
    except (TypeError, ValueError):
        return kind


def _spell(signature: inspect.Signature) -> str:
    spelled = []
    starred = False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            spelled.append("*")
        starred = starred or p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        spelled.append(f"{stars}{p.name}{'' if p.default is p.empty else '='}")
    return ", ".join(spelled)


def read_contract() -> dict[str, dict]:
    """Host version -> {"comfy_kitchen": version, "names": {name: entry}}, oldest first, differences resolved.

    Hosts with DynamicVRAM also have "layers": the names that host/residency.py knows, as a dynamic model has them.
    """
    stored = json.loads(CONTRACT.read_text("utf-8")) if CONTRACT.exists() else {}
    newest = list(stored.values())[-1]["names"] if stored else {}
    full = {}
    for version, record in stored.items():
        names = {name: entry for name, entry in (newest | record["names"]).items() if entry is not None}
        full[version] = record | {"names": names}
    return full


def write_contract(contract: dict[str, dict]) -> None:
    """The reverse of ``read_contract``."""
    versions = sorted(contract, key=lambda version: [int(part) for part in version.split(".")])
    newest = contract[versions[-1]]["names"]
    stored = {}
    for version in versions:
        names = contract[version]["names"]
        if version != versions[-1]:
            every = sorted(newest.keys() | names.keys())
            names = {name: names.get(name) for name in every if names.get(name) != newest.get(name)}
        stored[version] = contract[version] | {"names": names}
    CONTRACT.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _resolve(name: str) -> Any:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            call, part = part.endswith("()"), part.removesuffix("()")
            if not hasattr(value, part):
                return None
            value = getattr(value, part)
            value = value() if call else value
        return value if value is not None else "None"
    return None


def record_host() -> tuple[str, dict]:
    """(version, record) of the host that COMFYUI_PATH names. Raises RuntimeError with its output if that fails."""
    from nvfp4_video.tests.real.harness import run_in_host

    result = run_in_host(__file__, json.dumps(stub_names()))
    lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
    if result.returncode or not lines:
        raise RuntimeError(f"the host's Python could not describe itself:\n{result.stdout}\n{result.stderr}")
    answer = json.loads(lines[-1].removeprefix(MARK))
    return answer["version"], answer["record"]


def record_layers() -> tuple[str, dict]:
    """(version, names that the host's DynamicVRAM writes into layers, by its own functions; {} where it has none)."""
    from nvfp4_video.tests.real import dynamic_in_process
    from nvfp4_video.tests.real.harness import run_in_host

    with tempfile.TemporaryDirectory() as folder:
        result = run_in_host(dynamic_in_process.__file__, folder)
    lines = [line for line in result.stdout.splitlines() if line.startswith(dynamic_in_process.MARK)]
    if result.returncode or not lines:
        raise RuntimeError(f"the host could not load a dynamic model:\n{result.stdout}\n{result.stderr}")
    answer = json.loads(lines[-1].removeprefix(dynamic_in_process.MARK))
    found = answer.get("books", {})
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return answer["version"], {name: found[name] for name in dynamic_in_process.RECORDED if name in found}


def _describe_host(names: list[str]) -> None:
    # The host reads its command line while it is imported, and looks for a GPU unless told not to.
    sys.argv = ["main.py", "--cpu"]
    sys.path[0] = str(Path.cwd())
    version = importlib.import_module("comfyui_version").__version__
    importlib.import_module("comfy.options").enable_args_parsing()
    # In this order main.py does it; older hosts' ``nodes`` makes ``utils`` mean comfy/utils.py for all that follow.
    for name in ("utils.extra_config", "execution"):
        importlib.import_module(name)
    entries = {name: entry for name in names if (entry := describe(name))}
    record = {"comfy_kitchen": importlib.metadata.version("comfy-kitchen"), "names": entries}
    print(f"\n{MARK}{json.dumps({'version': version, 'record': record})}")


def _main() -> None:
    if len(sys.argv) > 1:
        return _describe_host(json.loads(sys.argv[1]))
    sys.path[0] = str(HERE)
    importlib.import_module("conftest")
    version, record = record_host()
    if layers := record_layers()[1]:
        record["layers"] = layers
    write_contract(read_contract() | {version: record})
    print(f"{CONTRACT.name}: {len(record['names'])} names of ComfyUI {version}")


if __name__ == "__main__":
    _main()
