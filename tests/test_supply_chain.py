# SPDX-License-Identifier: Apache-2.0
"""What the pack is made of and runs on: licences, versions and hashes, Actions by commit, no code from data."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from nvfp4_video.tests.support.source import ROOT, imported, pack_files, tracked_files, tree

SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCES = (".py", ".js")
OWN_BUILDS = {"torch", "triton"}  # of which machines have builds of their own
NO_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NO_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "yaml.load",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def locked(name: str) -> dict[str, int]:
    """A file of pip's -> "name==version" -> how many hashes it has."""
    found, current = {}, ""
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            current = line.split(";")[0].strip(" \\")
            found[current] = 0
        elif "--hash=sha256:" in line:
            found[current] += 1
    return found


def test_every_source_file_says_its_licence_in_its_first_lines():
    assert (ROOT / "LICENSE").read_text("utf-8").split() [:3] == ["Apache", "License", "Version"]
    without = [
        str(path)
        for path in tracked_files()
        if path.suffix in SOURCES and SPDX not in "".join((ROOT / path).read_text("utf-8").splitlines(True)[:2])
    ]
    assert without == []


def faults(module: ast.Module) -> list[str]:
    """Calls that run text as code, unpickle, or start a shell."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            shell = [key for key in node.keywords if key.arg == "shell" and ast.unparse(key.value) != "False"]
            unsafe = [key for key in node.keywords if key.arg == "weights_only" and ast.unparse(key.value) != "True"]
            pickled = [key for key in node.keywords if key.arg == "allow_pickle" and ast.unparse(key.value) != "False"]
            if name in NO_CALLS or shell or unsafe or pickled:
                found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_the_shipped_code_neither_runs_text_nor_unpickles_nor_starts_a_shell():
    wrong = [f"{path}:{fault}" for path in pack_files() for fault in faults(tree(path))]
    wrong += [f"{path}:{line}: {parts[0]}" for path in pack_files() for line, parts, relative in imported(path)
              if not relative and parts[0] in NO_MODULES]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')", "exec(x)", "torch.load(p)", "torch.load(p, weights_only=True)", "os.system('ls')",
        "subprocess.run(c, shell=True)", "subprocess.Popen(c, shell=flag)", "f(p, allow_pickle=True)",
        "__import__(name)", "compile(text, '', 'exec')",
    ],
)  # fmt: skip
def test_each_of_these_would_be_seen(text: str):
    assert faults(ast.parse(text))
    assert not faults(ast.parse("subprocess.run(c, shell=False); re.compile(x); model.eval(); json.load(f)"))


def test_workflows_name_actions_by_commit_and_version():
    used = [
        (path.name, line.strip())
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text("utf-8").splitlines()
        if "uses:" in line and "uses: ./" not in line
    ]
    assert used
    by_commit = re.compile(r"- uses: [\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*")
    assert [entry for entry in used if not by_commit.fullmatch(entry[1])] == []


@pytest.mark.parametrize("name", ["requirements-dev.lock", ".github/requirements-publish.txt"])
def test_every_locked_package_has_one_version_and_hashes(name: str):
    found = locked(name)
    assert found and [entry for entry in found if not re.fullmatch(r"[\w.-]+==[\w.]+", entry)] == []
    assert [entry for entry, hashes in found.items() if not hashes] == []


def test_the_lock_has_all_that_the_tests_ask_for_but_torch_and_triton():
    versions: dict[str, set[str]] = {}
    for entry in locked("requirements-dev.lock"):
        name, version = entry.split("==")
        versions.setdefault(name, set()).add(version)
    for line in (ROOT / "requirements-dev.txt").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        name, operator, version = re.match(r"([\w-]+)(==|>=)([\w.]+)", line).groups()
        if name in OWN_BUILDS:
            assert operator == "==" and name not in versions
        else:
            least = [int(part) for part in version.split(".")]
            assert all(
                found == version if operator == "==" else [int(part) for part in found.split(".")] >= least
                for found in versions[name]
            ), line


def test_whatever_pip_is_told_to_install_has_hashes_or_is_a_file_of_pinned_names():
    allowed = {"--require-hashes --no-deps -r requirements-dev.lock", "-r requirements-dev.txt"}
    allowed |= {"--require-hashes -r .github/requirements-publish.txt", "--require-hashes --no-deps -r ruff.lock"}
    told = [
        line.partition("install ")[2].replace("--quiet --disable-pip-version-check ", "").strip()
        for path in (Path("Makefile"), *(ROOT / ".github" / "workflows").glob("*.yml"))
        for line in (ROOT / path).read_text("utf-8").splitlines()
        if "pip install " in line
    ]
    assert told and set(told) <= allowed
