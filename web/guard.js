// SPDX-License-Identifier: Apache-2.0
// NVFP4 Video in the front end: a toast when the guard finds something at queue time, and the tab "NVFP4 Doctor".
//
// The server's part is host/guard/routes.py: GET /nvfp4/report, POST /nvfp4/check and the websocket event "nvfp4.findings".
// Nothing is requested before the panel opens or a finding arrives, so a server without these routes sees no calls.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { createPanel, fixLabel } from "./doctor.js";
import { applyFixes, jump, nodeTitle } from "./graph.js";
import { request, setting, texts } from "./host.js";
import { dismissToast, showToast } from "./toast.js";

const PANEL = "nvfp4-doctor";
const EVENT = "nvfp4.findings";
const ENABLED = "NVFP4.guard.enabled";
const TOAST_LIFE_MS = 20000;
const SEVERITIES = ["info", "warning", "error"];

const state = { report: null, findings: null, reading: null, problem: null };
const panel = createPanel({ refresh, jump, nodeTitle, apply });
let latestRefresh = 0;
let refreshing = false;
let stale = false;

/** Take over what changed in the state, and show it. */
async function show(change) {
  Object.assign(state, change);
  stale = false;
  const text = await texts();
  panel.show(state, text);
  panel.tell("");
  showBadge();
  return text;
}

/** Ask the host for its report and for the findings of the open workflow, and show both. */
async function refresh() {
  const mine = ++latestRefresh;
  refreshing = true;
  const text = state.report ? await texts() : await show();
  panel.tell(text("checking"), true);
  const report = await request("/nvfp4/report");
  const checked = report && (await check(text));
  if (mine !== latestRefresh) return;
  refreshing = false;
  const findings = checked?.findings && distinct([...checked.findings, ...(report.findings ?? [])]);
  await show({ report, findings, reading: checked?.reading ?? null, problem: checked?.problem });
  if (!report) panel.tell(text("unavailable"));
}

async function check(text) {
  try {
    const { output } = await app.graphToPrompt();
    const headers = { "Content-Type": "application/json" };
    const answer = await request("/nvfp4/check", { method: "POST", headers, body: JSON.stringify({ prompt: output }) });
    return answer ? { findings: answer.findings ?? [], reading: answer.reading } : { problem: text("notChecked") };
  } catch (error) {
    return { problem: `${text("notChecked")} ${error.message}` };
  }
}

/** The gravest first; of what concerns the workflow and the host alike, only what names the nodes. */
function distinct(findings) {
  const located = new Set(findings.filter(({ nodes }) => nodes?.length).map(({ id }) => id));
  const kept = findings.filter(({ id, nodes }) => nodes?.length || !located.has(id));
  return kept.sort((a, b) => SEVERITIES.indexOf(b.severity) - SEVERITIES.indexOf(a.severity));
}

/** The websocket event: what the guard found in the prompt this browser has just queued. */
async function onFindings(event) {
  const findings = distinct(event.detail?.findings ?? []);
  const text = await show({ findings, reading: null, problem: null });
  if (findings.length && setting(ENABLED) !== false) notify(findings, event.detail?.refused, text);
  else dismissToast(PANEL);
}

function notify(findings, refused, text) {
  const [finding] = findings;
  const { severity, title, remedy, fixes = [] } = finding;
  const kind = SEVERITIES.includes(severity) ? severity : "warning";
  const more = findings.length > 1 ? ` ${text("more", { count: findings.length - 1 })}` : "";
  const plain = (sentence) => String(sentence ?? "").replaceAll("`", "");
  const actions = [[text("details"), openPanel]];
  if (fixes.length) actions.unshift([fixLabel(finding, text), () => apply(finding)]);
  showToast({
    id: PANEL,
    kind,
    title: text("title"),
    paragraphs: [refused && text("refused"), plain(title) + more, remedy && `${text("remedy")} ${plain(remedy)}`],
    actions,
    close: text("close"),
    life: kind === "error" ? undefined : TOAST_LIFE_MS,
  });
}

/** Set what a finding says, and look at the workflow again; where it has an action, which is to run, queue it instead. */
async function apply({ fixes, action }) {
  const text = await texts();
  if (!applyFixes(fixes)) return panel.tell(text("notApplied"));
  if (action) await app.queuePrompt(0, 1);
  else await refresh();
  panel.tell(text("applied"));
}

function openPanel() {
  const tabs = app.extensionManager.sidebarTab;
  if (tabs?.activeSidebarTabId !== PANEL) app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${PANEL}`);
}

/** The number of errors and warnings on the tab's icon. */
function showBadge() {
  const tab = app.extensionManager?.getSidebarTabs?.().find(({ id }) => id === PANEL);
  const count = (state.findings ?? []).filter(({ severity }) => severity !== "info").length;
  if (tab) tab.iconBadge = count && setting(ENABLED) !== false ? String(count) : "";
}

async function onGraphChanged() {
  if (refreshing || stale || !state.findings) return;
  stale = true;
  panel.tell((await texts())("stale"));
}

app.registerExtension({
  name: "nvfp4-video.doctor",
  settings: [
    {
      id: "NVFP4.guard.policy",
      category: ["NVFP4 Video", "Launch guard", "policy"],
      name: "When a queued workflow is in danger",
      tooltip: "Warn shows what was found and runs the workflow; Block refuses it with an error on the node.",
      type: "combo",
      options: [
        { text: "Warn", value: "warn" },
        { text: "Block", value: "block" },
      ],
      defaultValue: "warn",
    },
    {
      id: ENABLED,
      category: ["NVFP4 Video", "Launch guard", "enabled"],
      name: "Check queued workflows",
      tooltip: "Looks for known crashes and wrong settings whenever a workflow is queued.",
      type: "boolean",
      defaultValue: true,
      onChange: showBadge,
    },
  ],
  commands: [{ id: "NVFP4.OpenDoctor", label: "Open NVFP4 Doctor", icon: "mdi mdi-stethoscope", function: openPanel }],
  menuCommands: [{ path: ["Extensions", "NVFP4 Video"], commands: ["NVFP4.OpenDoctor"] }],
  afterConfigureGraph: onGraphChanged,
  setup() {
    app.extensionManager?.registerSidebarTab?.({
      id: PANEL,
      icon: "mdi mdi-stethoscope",
      title: "NVFP4 Doctor",
      tooltip: "NVFP4 Doctor",
      type: "custom",
      // The front end calls this again whenever it redraws the tab, and with a new container when the tab reopens.
      render(container) {
        if (panel.element.parentElement === container) return;
        container.replaceChildren(panel.element);
        refresh();
      },
    });
    api.addEventListener(EVENT, onFindings);
    api.addEventListener("graphChanged", onGraphChanged);
  },
});
