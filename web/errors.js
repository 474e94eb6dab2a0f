// SPDX-License-Identifier: Apache-2.0
// An error of one of this pack's nodes, in the words of the node. Newer front ends say that the node threw an error, and
// show its message two clicks further on.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { jump, nodeTitle } from "./graph.js";
import { ORIGIN, texts } from "./host.js";
import { dismissToast, showToast } from "./toast.js";

const TOAST = "nvfp4-error";
const names = new Map(); // class -> the name that its nodes show

async function onError({ detail }) {
  const name = names.get(detail?.node_type);
  if (!name) return;
  const text = await texts();
  const id = detail.node_id;
  const title = nodeTitle(id);
  showToast({
    id: TOAST,
    kind: "error",
    title: title === name || title === null ? `${name} #${id}` : `${name}: ${title} #${id}`,
    paragraphs: [String(detail.exception_message ?? "").trim()],
    actions: title === null ? [] : [[text("goToNode"), () => jump(id)]],
    close: text("close"),
  });
}

app.registerExtension({
  name: "nvfp4-video.errors",
  beforeRegisterNodeDef(_type, { name, display_name, python_module }) {
    if (python_module === ORIGIN) names.set(name, display_name || name);
  },
  setup() {
    api.addEventListener("execution_error", onError);
    api.addEventListener("execution_start", () => dismissToast(TOAST));
  },
});
