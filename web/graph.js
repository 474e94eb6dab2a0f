// SPDX-License-Identifier: Apache-2.0
// The open workflow by the ids of an API prompt: "7" is a node of the root graph, "3:7" node 7 in the subgraph of node 3.

import { app } from "../../scripts/app.js";

const rootGraph = () => app.rootGraph ?? app.graph;
const nodeIn = (graph, id) => graph?.getNodeById(id) ?? graph?.getNodeById(Number(id)) ?? null;

/** The node of an API id in the root graph; of "12:34", a node in a subgraph, the outermost one. */
function outermostNode(id) {
  return nodeIn(rootGraph(), String(id).split(":")[0]);
}

/** What the outermost node of an API id is called, or null if the graph lacks it. */
export function nodeTitle(id) {
  const node = outermostNode(id);
  return node && String(node.title || node.type);
}

/** Leave an open subgraph if need be, then select and centre the node; both node renderers follow the canvas. */
export async function jump(id) {
  const node = outermostNode(id);
  if (!node) return;
  const { canvas } = app;
  if (canvas.graph !== node.graph) {
    canvas.setGraph(node.graph);
    // The front end restores the graph's last view within the next two frames.
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  }
  canvas.selectNode(node);
  canvas.centerOnNode(node);
}

/** Set the widgets that `fixes` name, all of them or none, in one step that Ctrl+Z takes back; true if it was done. */
export function applyFixes(fixes) {
  const found = fixes.map(({ node, input, value }) => ({ ...widgetOf(node, input), value }));
  if (!found.length || found.some(({ widget }) => !widget)) return false;
  app.canvas.emitBeforeChange?.();
  for (const { node, widget, value } of found) {
    const old = widget.value;
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
    node.onWidgetChanged?.(widget.name, value, old, widget);
  }
  app.canvas.emitAfterChange?.();
  app.canvas.setDirty(true, true);
  return true;
}

/** The widget that decides an input of the API prompt: where a subgraph's own input does, that of its node. */
function widgetOf(id, input) {
  const path = String(id).split(":");
  const nodes = [];
  let graph = rootGraph();
  for (const part of path) {
    const node = nodeIn(graph, part);
    if (!node) return {};
    nodes.push(node);
    graph = node.subgraph;
  }
  let name = input;
  for (const node of nodes.reverse()) {
    const slot = node.inputs?.find((socket) => socket.name === name || socket.widget?.name === name);
    const link = slot?.link != null ? linkOf(node.graph, slot.link) : null;
    if (!link) return { node, widget: node.widgets?.find((widget) => widget.name === name) };
    const outer = node.graph.inputNode?.id === link.origin_id ? node.graph.inputs?.[link.origin_slot] : null;
    if (!outer) return {};
    name = outer.name;
  }
  return {};
}

const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id] ?? null;
