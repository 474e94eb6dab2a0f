# SPDX-License-Identifier: Apache-2.0
"""The suite can be collected where POSIX, Linux and Triton are missing, as on Windows: a skip needs a collected test.

This takes away what Windows lacks; it cannot add what Windows does otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "triton")
NAMES = ("fork", "forkpty", "geteuid", "getuid", "killpg", "mkfifo", "posix_fadvise", "sched_getaffinity", "sysconf")
SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1")
CHILD = """
import os, signal, subprocess, sys, torch, pytest
for name in {modules}:
    sys.modules[name] = None
for module, names in ((os, {names}), (signal, {signals})):
    for name in names:
        vars(module).pop(name, None)
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def test_every_test_file_is_collected_without_what_windows_lacks():
    code = CHILD.format(modules=MODULES, names=NAMES, signals=SIGNALS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    collected = {line.partition("::")[0] for line in result.stdout.splitlines() if "::" in line}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    left_out = {path.rpartition("/")[2] for path in files - collected}
    assert left_out == {"test_compiled_kernels.py"}, "it asks for Triton first, as no other may"
