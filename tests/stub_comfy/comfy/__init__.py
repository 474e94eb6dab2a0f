# SPDX-License-Identifier: Apache-2.0
"""Stand-in for ComfyUI's ``comfy``: the names the pack uses, each checked against real hosts by tests/test_contract.py.

Every stub module lists in ``__all__`` what it offers. A call that works here must work on every recorded host, so what
an older host lacks is either missing here too or named in tests/test_contract.py as what the pack has to probe for.
"""
