# SPDX-License-Identifier: Apache-2.0
"""Where the guard meets the host's server: one line at start-up, the handler of queued prompts, three read-only routes.

The handler sees every prompt before the host validates it, whoever queued it. It logs the findings, sends them to the
client that queued the prompt, and puts them into the prompt's extra_data, so that they stand in the history. Under
`block` it hands the host a prompt that cannot pass instead (``_refused``). Whatever goes wrong in here, the prompt goes
on as it came. The host calls the handler on its event loop, with whatever was posted: the check runs on a thread that
is waited for LIMIT seconds, and only what has the type that the host expects is used as a key or a name.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import folder_paths
from server import PromptServer

from ...checkpoint.file.header import CheckpointError, no_collection, open_regular
from ...measure.escape import line
from ..border import answered, log_fault
from ..doctor import report as doctor
from ..doctor.probe import probe
from ..show import reports
from . import check as guard
from .kinds import GUARD_NODE
from .limit import within
from .prompt_graph import PromptGraph
from .reading import EMPTY, NotRead, Reading, read

logger = logging.getLogger(__name__)

REPORT_ROUTE, CHECK_ROUTE, REPORTS_ROUTE = "/nvfp4/report", "/nvfp4/check", "/nvfp4/reports"
EVENT = "nvfp4.findings"
IN_HISTORY = "nvfp4_findings"
ENABLED, POLICY = "NVFP4.guard.enabled", "NVFP4.guard.policy"
MAX_BODY, MAX_SETTINGS = 4 << 20, 4 << 20
LIMIT, CHECK_LIMIT = 1.0, 20.0  # seconds: a queued prompt, which keeps the host's event loop waiting; Doctor's check
MOST_LINES = 20  # of the log, a prompt
# What the policy widget of a refused prompt begins with; the rest is the reason (see NVFP4LaunchGuard.validate_inputs).
REFUSED = "refused: "


def start() -> None:
    """Add routes and handler to the host's server, once however often the pack is loaded, and look at the host."""
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", None) == REPORT_ROUTE for route in server.routes):
        return
    server.routes.get(REPORT_ROUTE)(get_report)
    server.routes.post(CHECK_ROUTE)(post_check)
    server.routes.get(REPORTS_ROUTE)(get_reports)
    server.add_on_prompt_handler(on_prompt)
    try:
        findings = guard.check_host(probe())
    except Exception as error:
        log_fault(error, "looking at the host")
        return
    if findings:
        logger.warning("NVFP4 guard: %s", " ".join(guard.one_line(finding) for finding in findings))


@answered
async def get_report(request: Any) -> Any:
    """GET: the host report of doctor.py, findings on the host included."""
    from aiohttp import web

    facts = await asyncio.to_thread(probe)
    report = await asyncio.to_thread(doctor.report, facts, guard.check_host(facts))
    return web.json_response(report)


@answered
async def post_check(request: Any) -> Any:
    """POST a prompt, as it is or in an envelope -> {"findings": [...], "reading": {...}}. Nothing is queued or kept.

    ``reading`` says what the body was taken for, how many of its nodes were understood, and what was not.
    """
    from aiohttp import web

    body = bytearray()
    async for chunk in request.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MAX_BODY:
            return web.json_response({"error": f"the prompt is larger than {MAX_BODY >> 20} MiB"}, status=413)

    def judge() -> tuple[Reading, list[guard.Finding]]:
        found = read(bytes(body))
        return found, guard.check(found.prompt, probe(), limit=CHECK_LIMIT)

    answer: dict[str, Any] = {}
    try:
        found, findings = await asyncio.to_thread(within, CHECK_LIMIT, judge)
        answer["reading"] = found.as_dict()
        if found.shape == EMPTY:
            findings = [guard.nothing_to_check()]
    except TimeoutError:
        findings = [guard.not_in_time(CHECK_LIMIT)]
    except NotRead as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response({"findings": [finding.as_dict() for finding in findings]} | answer)


@answered
async def get_reports(request: Any) -> Any:
    """GET ?workflow=<id>&node=<id> <class>&node=... -> {"reports": node id -> what it last reported}."""
    from aiohttp import web

    history = PromptServer.instance.prompt_queue.get_history()
    nodes = dict(node.split(" ", 1) for node in request.query.getall("node", []) if " " in node)
    return web.json_response({"reports": reports(history, request.query.get("workflow", ""), nodes)})


def on_prompt(data: Any) -> Any:
    """The host's prompt handler: body of POST /prompt -> the same with findings in its extra_data, or a refused one."""
    try:
        return _handle(data) if isinstance(data, dict) else data
    except Exception as error:
        log_fault(error, "checking a prompt, which goes on unchecked and unchanged,")
        return data


def _handle(data: dict[str, Any]) -> dict[str, Any]:
    try:
        policy, findings = within(LIMIT, lambda: _judge(data))
    except TimeoutError:
        policy, findings = guard.WARN, [guard.not_in_time(LIMIT)]
    if policy is None:
        return data
    listed = [finding.as_dict() for finding in findings]
    errors = [finding for finding in findings if finding.severity == guard.ERROR]
    refused = policy == guard.BLOCK and bool(errors)
    client = data.get("client_id")
    # The host looks the client up in a dict, and its loop of messages ends on what cannot be a key.
    if isinstance(client, str):  # without findings too: the client drops those of the prompt before
        PromptServer.instance.send_sync(EVENT, {"findings": listed, "refused": refused}, client)
    if not findings:
        return data
    for finding in findings[:MOST_LINES]:
        level = logging.INFO if finding.severity == guard.INFO else logging.WARNING
        logger.log(level, "NVFP4 guard: %s", guard.one_line(finding))
    if len(findings) > MOST_LINES:
        logger.warning("NVFP4 guard: %d more findings on this prompt", len(findings) - MOST_LINES)
    if refused:
        return _refused(data, errors)
    extra = data.get("extra_data", {})
    if not isinstance(extra, dict):  # the host's to refuse
        return data
    return data | {"extra_data": extra | {IN_HISTORY: listed}}


@no_collection()  # which would look at the 10,000 nodes of a prompt again and again
def _judge(data: dict[str, Any]) -> tuple[str | None, list[guard.Finding]]:
    """Body of POST /prompt -> policy, findings; None for a user who switched the check off."""
    graph = PromptGraph(data.get("prompt"))
    policy = guard.policy_in_graph(graph)
    if policy is None:
        settings = _settings()
        if settings.get(ENABLED, True) is False:
            return None, []
        policy = settings.get(POLICY)
    return policy if policy in guard.POLICIES else guard.WARN, guard.check(graph, probe(), _targets(data), LIMIT)


def _refused(data: dict[str, Any], errors: Collection[guard.Finding]) -> dict[str, Any]:
    """A prompt that the host refuses with our reason, at the nodes where the trouble is.

    The host knows no way to refuse from a handler, and runs the outputs that pass when others do not. So the prompt is
    replaced by NVFP4LaunchGuard nodes under the ids of the nodes in question, whose policy says why: they are its only
    outputs, and their validation fails with that text, which the host answers as node errors.
    """
    reasons: dict[str, list[str]] = {}
    for error in errors:
        node = error.nodes[0] if error.nodes else GUARD_NODE
        reasons.setdefault(node, []).append(line(f"{error.title} {error.why} {error.remedy}"))
    prompt = {
        node: {"class_type": GUARD_NODE, "inputs": {"model": None, "policy": REFUSED + "\n".join(texts)}}
        for node, texts in reasons.items()
    }
    return {key: value for key, value in data.items() if key != "partial_execution_targets"} | {"prompt": prompt}


def _targets(data: dict[str, Any]) -> list[str] | None:
    """The outputs that will run, where the client asked for some of them only; the host compares ids as they are."""
    targets = data.get("partial_execution_targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else None


def _settings() -> dict[str, Any]:
    """The front end's saved settings of the user `default`, the only one on most hosts; empty without any."""
    path = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        with open_regular(path) as file:
            settings = json.loads(file.read(MAX_SETTINGS))
    except (CheckpointError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
