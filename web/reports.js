// SPDX-License-Identifier: Apache-2.0
// Reports on the nodes of this pack: their text as the host has it in `ui.text`, in the node until it runs again.
//
// Front ends draw progress texts while a job runs, and newer ones drop them when it ends; none draws `ui.text` on
// nodes of a pack. So a report is drawn here, from three sources: a node that has just run or was cached (onExecuted),
// outputs that the front end brings back when a tab is shown again (onNodeOutputsUpdated), and the host's history for
// a workflow that was opened anew (GET /nvfp4/reports, host/guard/routes.py). While a node reports progress its old report
// is taken off, and with a report the front end's progress text is: one text a node.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ORIGIN, request, texts } from "./host.js";
import { createReport } from "./report.js";

const WIDGET = "nvfp4_report";
// The front end's own widget for progress texts, which older versions leave on the node when a job ends.
const PROGRESS_WIDGET = "$$node-text-preview";

const ours = new Set(); // classes of this pack
const reporting = new Set(); // those of them that are outputs
const reports = new WeakMap();
let latestRestore = 0;

const rootGraph = () => app.rootGraph ?? app.graph;
const typeOf = (node) => node.comfyClass ?? node.type;
const reportsOn = (node) => reporting.has(typeOf(node));

/**
 * Every reporting node of the open workflow: its execution id ("7", or "3:7" for node 7 in the subgraph of node 3), and
 * its locator, by which the front end keeps outputs ("7", or "<id of the subgraph>:7").
 */
function* reportingNodes(graph = rootGraph(), path = "") {
  for (const node of graph?.nodes ?? []) {
    if (node.subgraph) yield* reportingNodes(node.subgraph, `${path}${node.id}:`);
    else if (reportsOn(node)) yield { node, id: path + node.id, locator: (path && `${graph.id}:`) + node.id };
  }
}

/** All nodes of the open workflow, those in subgraphs too. */
function* allNodes(graph = rootGraph()) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

/** A job that was cancelled or failed leaves its last progress text, "45 s left", on nodes of some front ends. */
function dropProgress() {
  for (const node of allNodes()) if (ours.has(typeOf(node))) removeWidget(node, PROGRESS_WIDGET);
}

/** Draw the report in a node's output; what has none leaves the node as it is. */
function draw(node, output) {
  const text = [output?.text ?? []].flat().join("\n");
  if (!text) return;
  removeWidget(node, PROGRESS_WIDGET);
  let report = reports.get(node);
  if (!report) reports.set(node, (report = addReport(node)));
  report.show(text, output.nvfp4_picture?.[0]);
}

function addReport(node) {
  const report = createReport((picture) => api.apiURL(`/view?${picture}`), texts);
  let [least, whole] = [0, 0];
  const widget = node.addDOMWidget(WIDGET, WIDGET, report.element, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => report.text(),
    setValue: () => {},
    getMinHeight: () => least,
    getMaxHeight: () => whole,
  });
  widget.serialize = false;
  report.onHeight((...heights) => {
    [least, whole] = heights.map((height) => height + 2 * (widget.margin ?? 0));
    fit(node);
  });
  return report;
}

/** Make the node as large as its widgets need, never smaller. */
function fit(node) {
  const [width, height] = node.computeSize();
  if (width > node.size[0] || height > node.size[1]) {
    node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  }
  node.setDirtyCanvas?.(true, true);
}

function removeWidget(node, name) {
  const widget = node.widgets?.find((found) => found.name === name);
  if (widget) node.removeWidget(widget);
}

/** Draw what the host's history has of the open workflow: of each node the last run that reported. */
async function restore() {
  const mine = ++latestRestore;
  const nodes = [...reportingNodes()];
  if (!nodes.length) return;
  const query = new URLSearchParams({ workflow: rootGraph().id ?? "" });
  for (const { id, node } of nodes) query.append("node", `${id} ${typeOf(node)}`);
  const found = await request(`/nvfp4/reports?${query}`);
  if (mine !== latestRestore) return;
  for (const { id, node } of nodes) draw(node, found?.reports?.[id]);
}

app.registerExtension({
  name: "nvfp4-video.reports",
  beforeRegisterNodeDef(_type, { name, python_module, output_node }) {
    if (python_module !== ORIGIN) return;
    ours.add(name);
    if (output_node) reporting.add(name);
  },
  nodeCreated(node) {
    if (!reportsOn(node)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.call(this, output);
      draw(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) {
    for (const { node, locator } of reportingNodes()) draw(node, outputs?.[locator]);
  },
  afterConfigureGraph: restore,
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      for (const { id, node } of reportingNodes()) {
        if (id === String(detail.nodeId) && reports.delete(node)) removeWidget(node, WIDGET);
      }
    });
    for (const end of ["execution_interrupted", "execution_error"]) api.addEventListener(end, dropProgress);
    // The end of a job: its outputs are in the history by now, also those of a tab that was not shown meanwhile.
    api.addEventListener("executing", ({ detail }) => detail ?? restore());
  },
});
