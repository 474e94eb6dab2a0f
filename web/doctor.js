// SPDX-License-Identifier: Apache-2.0
// The NVFP4 Doctor's panel: a state object in, DOM out. No requests and no knowledge of the graph; guard.js has both.
//
// Everything that comes from the server is set as text that hides nothing (visible.js). Colours are the front end's own
// variables, so that the panel follows every colour palette; the second names are those of front ends before the design
// tokens.

import { visible } from "./visible.js";

const STYLE_ID = "nvfp4-doctor-style";
const LONGEST_COPY = 500000; // characters of a report
const ICONS = {
  error: "pi pi-times-circle",
  warning: "pi pi-exclamation-triangle",
  info: "pi pi-info-circle",
  fast: "pi pi-check-circle",
  slow: "pi pi-exclamation-triangle",
  unknown: "pi pi-question-circle",
  none: "pi pi-minus-circle",
};

const STYLE = `
.nvfp4-doctor {
  --nd-text: var(--base-foreground, var(--fg-color));
  --nd-card: var(--secondary-background, var(--comfy-input-bg));
  /* The palettes' own muted text falls below a contrast of 4.5 on a card. */
  --nd-muted: color-mix(in srgb, var(--nd-text) 72%, var(--nd-card));
  --nd-line: var(--border-default, var(--border-color));
  --nd-error: #e5484d; --nd-warning: #d9860a; --nd-info: #3b82f6; --nd-good: #2f9e58;
  box-sizing: border-box; padding: 0 1rem 1.5rem; color: var(--nd-text); font-size: 0.8125rem; line-height: 1.45;
  overflow-wrap: anywhere;
}
.nvfp4-doctor header {
  position: sticky; top: 0; z-index: 1; margin: 0 -1rem; padding: 0.75rem 1rem 0.5rem;
  background: var(--comfy-menu-bg); border-bottom: 1px solid var(--nd-line);
}
.nvfp4-doctor h2 { margin: 0 0 0.5rem; font-size: 1rem; font-weight: 600; }
.nvfp4-doctor h3 { margin: 1.25rem 0 0.5rem; font-size: 0.875rem; font-weight: 600; }
.nvfp4-doctor p { margin: 0.25rem 0 0; }
.nvfp4-doctor ul { margin: 0; padding: 0; list-style: none; display: grid; gap: 0.5rem; }
.nvfp4-doctor .nd-row { display: flex; flex-wrap: wrap; gap: 0.375rem; align-items: center; }
.nvfp4-doctor .nd-status { min-height: 1.2em; color: var(--nd-muted); font-size: 0.75rem; }
.nvfp4-doctor .nd-muted { color: var(--nd-muted); }
.nvfp4-doctor .nd-card {
  padding: 0.625rem 0.75rem; border-radius: 0.5rem; background: var(--nd-card);
  border-left: 3px solid var(--nd-tone, transparent);
}
.nvfp4-doctor .nd-title { display: flex; gap: 0.5rem; align-items: flex-start; font-weight: 600; }
.nvfp4-doctor .nd-title i { margin-top: 0.15em; }
.nvfp4-doctor .nd-title i, .nvfp4-doctor .nd-tone { color: color-mix(in srgb, var(--nd-tone) 60%, var(--nd-text)); }
.nvfp4-doctor .nd-error { --nd-tone: var(--nd-error); }
.nvfp4-doctor .nd-warning, .nvfp4-doctor .nd-slow { --nd-tone: var(--nd-warning); }
.nvfp4-doctor .nd-info { --nd-tone: var(--nd-info); }
.nvfp4-doctor .nd-fast { --nd-tone: var(--nd-good); }
.nvfp4-doctor .nd-unknown, .nvfp4-doctor .nd-none { --nd-tone: var(--nd-muted); }
.nvfp4-doctor .nd-card .nd-row { margin-top: 0.5rem; }
.nvfp4-doctor button {
  display: inline-flex; gap: 0.375rem; align-items: center; max-width: 100%; padding: 0.3rem 0.6rem;
  font: inherit; color: inherit; text-align: left; cursor: pointer;
  background: transparent; border: 1px solid var(--nd-line); border-radius: 0.375rem;
}
.nvfp4-doctor header button { background: var(--nd-card); }
.nvfp4-doctor button:hover:not(:disabled) { background: var(--interface-panel-hover-surface, var(--nd-card)); }
.nvfp4-doctor button:disabled { opacity: 0.55; cursor: default; }
.nvfp4-doctor :focus-visible { outline: 2px solid var(--p-primary-color, var(--nd-info)); outline-offset: 2px; }
.nvfp4-doctor p.nd-muted::first-letter, .nvfp4-doctor .nd-flags dd::first-letter { text-transform: uppercase; }
.nvfp4-doctor pre {
  margin: 0.375rem 0 0; padding: 0.625rem 0.75rem; border: 1px solid var(--nd-line); border-radius: 0.5rem;
  background: var(--comfy-input-bg); color: var(--input-text); font-size: 0.75rem; white-space: pre-wrap;
  user-select: text;
}
.nvfp4-doctor code { font-size: 0.75rem; }
.nvfp4-doctor .nd-flag { display: inline-block; }
.nvfp4-doctor dl { margin: 0; }
.nvfp4-doctor .nd-flags dt { margin-top: 0.5rem; }
.nvfp4-doctor .nd-flags dd { margin: 0; color: var(--nd-muted); }
.nvfp4-doctor .nd-facts { display: grid; grid-template-columns: minmax(6rem, 2fr) 3fr; gap: 0.25rem 0.75rem; }
.nvfp4-doctor .nd-facts dt { color: var(--nd-muted); }
.nvfp4-doctor .nd-facts dd { margin: 0; user-select: text; }
.nvfp4-doctor summary { padding: 0.3rem 0; cursor: pointer; font-weight: 600; }
.nvfp4-doctor details + details { margin-top: 0.25rem; border-top: 1px solid var(--nd-line); }
.nvfp4-doctor details dl { padding-bottom: 0.5rem; }
`;

/** An element with attributes (a function is an event listener) and children; strings become text. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) element.setAttribute(name, visible(value));
  }
  const kept = children.flat().filter((child) => child !== null && child !== undefined && child !== "");
  element.append(...kept.map((child) => (child instanceof Node ? child : visible(child))));
  return element;
}

/** Text in which no line ends within a flag, at whose hyphens browsers would wrap. */
const flagged = (text) =>
  visible(text).split(/(--[\w-]+)/).map((part, index) => (index % 2 ? h("span", { class: "nd-flag" }, part) : part));

/** A sentence of the server -> text and, for what stands in backticks, code. */
const prose = (sentence) =>
  visible(sentence).split("`").flatMap((part, index) => (index % 2 ? h("code", {}, part) : flagged(part)));

const tone = (word) => h("span", { class: "nd-tone" }, word);
const icon = (name) => h("i", { class: ICONS[name] ?? ICONS.unknown, "aria-hidden": "true" });

/** What a finding's `fixes` do, in short: "length = 121, frames_number = 121". */
const fixText = (fixes) => [...new Set(fixes.map(({ input, value }) => `${input} = ${value}`))].join(", ");

/** What the button of a finding with `fixes` says. */
export const fixLabel = ({ fixes, action }, text) =>
  action ? text(`action.${action}`) : text("apply", { what: fixText(fixes) });

/**
 * The panel. `actions`: refresh(), jump(nodeId), nodeTitle(nodeId) -> string, or null if the graph lacks the node,
 * apply(finding), which sets its fixes.
 *
 * Returns `.element`; `.show({report, findings, reading, problem}, text)`, the first three as the routes answer them or
 * null, `problem` a sentence that replaces the findings, `text` of texts.js; and `.tell(sentence, busy)`, the status line.
 */
export function createPanel(actions) {
  const status = h("p", { class: "nd-status", role: "status", "aria-live": "polite" });
  const heading = h("h2");
  const refresh = h("button", { type: "button", click: () => actions.refresh() });
  const copyReport = h("button", { type: "button" });
  const body = h("div");
  const element = h(
    "section",
    { class: "nvfp4-doctor" },
    h("header", {}, heading, h("div", { class: "nd-row" }, refresh, copyReport), status),
    body,
  );
  const closed = new Set();
  let shown = {};
  let text = (key) => key;

  const copy = async (what) => {
    status.textContent = text((await copyText(what)) ? "copied" : "copyFailed");
  };
  copyReport.addEventListener("click", () => copy(reportAsText(shown, text)));

  return {
    element,
    show(state, translate) {
      [shown, text] = [state, translate];
      addStyle();
      heading.textContent = text("title");
      refresh.replaceChildren(h("i", { class: "pi pi-refresh", "aria-hidden": "true" }), text("refresh"));
      copyReport.replaceChildren(h("i", { class: "pi pi-copy", "aria-hidden": "true" }), text("copyReport"));
      copyReport.disabled = !state.report;
      body.replaceChildren(...sections(state, text, { ...actions, copy, closed }));
    },
    tell(sentence, busy = false) {
      element.setAttribute("aria-busy", String(busy));
      status.textContent = sentence;
    },
  };
}

function sections({ report, findings, reading, problem }, text, actions) {
  return [
    (findings || problem) && section(text("findings"), findingList(findings, reading, problem, text, actions)),
    report && section(text("models"), modelList(report.models ?? [], text)),
    report?.launch && section(text("launch"), launchCommand(report.launch, text, actions)),
    report && section(text("host"), factGroups(report.facts ?? [], text, actions.closed)),
  ].filter(Boolean);
}

function section(title, content) {
  return h("section", { "aria-label": title }, h("h3", {}, title), content);
}

function findingList(findings, reading, problem, text, actions) {
  if (problem) return h("p", { class: "nd-muted" }, problem);
  // What was not understood may be what is wrong: then "nothing found" is said of the rest alone.
  const unknown = reading?.unknown?.length ? h("p", { class: "nd-muted nd-reading" }, reading.text) : null;
  const none = unknown ? text("noneUnderstood", reading) : text("noFindings");
  const list = findings?.length
    ? h("ul", {}, findings.map((finding) => findingCard(finding, text, actions)))
    : h("p", { class: "nd-muted" }, none);
  return h("div", {}, list, unknown);
}

function findingCard(finding, text, actions) {
  const nodes = (finding.nodes ?? []).map((id) => {
    const title = actions.nodeTitle(id);
    const label = title === null ? text("missingNode", { node: id }) : text("goTo", { node: `${title} (${id})` });
    return h(
      "button",
      { type: "button", "aria-label": label, title: label, disabled: title === null, click: () => actions.jump(id) },
      h("i", { class: "pi pi-arrow-right", "aria-hidden": "true" }),
      `${title ?? ""} #${id}`.trim(),
    );
  });
  const fixes = finding.fixes ?? [];
  const tool = h("i", { class: "pi pi-wrench", "aria-hidden": "true" });
  const fix = h("button", { type: "button", click: () => actions.apply(finding) }, tool, fixLabel({ ...finding, fixes }, text));
  return h(
    "li",
    { class: `nd-card nd-${finding.severity}` },
    h("div", { class: "nd-title" }, icon(finding.severity), h("span", {}, prose(finding.title))),
    h("p", {}, tone(text(`severity.${finding.severity}`)), ". ", h("span", { class: "nd-muted" }, prose(finding.why))),
    finding.remedy && h("p", {}, h("strong", {}, text("remedy")), " ", prose(finding.remedy)),
    fixes.length > 0 ? h("div", { class: "nd-row" }, fix) : null,
    nodes.length > 0 ? h("div", { class: "nd-row" }, nodes) : null,
  );
}

function modelList(models, text) {
  if (!models.length) return h("p", { class: "nd-muted" }, text("noModels"));
  const card = ({ name, verdict, text: sentence, why }) =>
    h(
      "li",
      { class: `nd-card nd-${verdict}` },
      h("div", { class: "nd-title" }, icon(verdict), h("span", {}, name)),
      h("p", {}, tone(text(`verdict.${verdict}`)), sentence ? `. ${sentence}` : ""),
      why && h("p", { class: "nd-muted" }, prose(why)),
    );
  return h("ul", {}, models.map(card));
}

function launchCommand(launch, text, actions) {
  const flags = (launch.flags ?? []).flatMap(({ flag, why, evidence }) => [
    h("dt", {}, h("code", {}, flag)),
    h("dd", {}, prose([why, evidence && `(${evidence})`].filter(Boolean).join(" "))),
  ]);
  return h(
    "div",
    {},
    launch.name && h("p", {}, launch.name),
    h("pre", { tabindex: "0", "aria-label": text("launch") }, launch.command),
    h(
      "div",
      { class: "nd-row", style: "margin-top: 0.5rem" },
      h(
        "button",
        { type: "button", click: () => actions.copy(launch.command) },
        h("i", { class: "pi pi-copy", "aria-hidden": "true" }),
        text("copyCommand"),
      ),
    ),
    flags.length > 0 ? h("dl", { class: "nd-flags" }, flags) : null,
    launch.note && h("p", { class: "nd-muted" }, prose(launch.note)),
    otherFlags(launch.others ?? [], text),
  );
}

/** Flags that this host knows and nobody recommends here, with what they do. */
function otherFlags(others, text) {
  if (!others.length) return null;
  const rows = others.flatMap(({ flag, what }) => [h("dt", {}, h("code", {}, flag)), h("dd", {}, prose(what))]);
  return h("details", {}, h("summary", {}, text("otherFlags")), h("dl", { class: "nd-flags" }, rows));
}

function factGroups(facts, text, closed) {
  return h(
    "div",
    {},
    [...grouped(facts)].map(([group, members]) => {
      const toggled = (event) => closed[event.target.open ? "delete" : "add"](group);
      const rows = members.flatMap((fact) => [
        h("dt", {}, text(`facts.${fact.id}`, {}, fact.label)),
        h("dd", { title: fact.source, class: fact.known ? null : "nd-muted" }, flagged(fact.text)),
      ]);
      return h(
        "details",
        { open: !closed.has(group), toggle: toggled },
        h("summary", {}, text(`groups.${group}`, {}, group)),
        h("dl", { class: "nd-facts" }, rows),
      );
    }),
  );
}

function grouped(facts) {
  const groups = new Map();
  for (const fact of facts) groups.set(fact.group, [...(groups.get(fact.group) ?? []), fact]);
  return groups;
}

/** What "copy report" copies: plain text for an issue, each fact with its source. */
function reportAsText({ report, findings, reading }, text) {
  const lines = [text("title")];
  for (const [group, facts] of grouped(report?.facts ?? [])) {
    lines.push("", `[${group}]`, ...facts.map(({ label, text: value, source }) => `${label}: ${value} (${source})`));
  }
  const models = (report?.models ?? []).map((model) => `${model.name}: ${model.verdict}. ${model.text} ${model.why}`);
  const found = (findings ?? []).map((finding) => `${finding.severity}: ${finding.title} ${nodeList(finding)}`.trim());
  lines.push("", `[${text("models")}]`, ...models, "", `[${text("findings")}]`, ...found);
  if (reading?.text) lines.push(reading.text);
  if (report?.launch) lines.push("", `[${text("launch")}]`, report.launch.command);
  return `${visible(lines.join("\n"), LONGEST_COPY)}\n`;
}

const nodeList = ({ nodes }) => (nodes?.length ? `(${nodes.map((id) => `#${id}`).join(", ")})` : "");

/** Put text on the clipboard; true if that worked. Pages served without TLS to another machine have no clipboard. */
async function copyText(what) {
  try {
    await navigator.clipboard.writeText(what);
    return true;
  } catch {
    return copyBySelection(what);
  }
}

function copyBySelection(what) {
  const focused = document.activeElement;
  const field = h("textarea", { readonly: true, style: "position: fixed; opacity: 0", "aria-hidden": "true" });
  field.value = what;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

function addStyle() {
  if (document.getElementById(STYLE_ID)) return;
  document.head.append(Object.assign(document.createElement("style"), { id: STYLE_ID, textContent: STYLE }));
}
