// SPDX-License-Identifier: Apache-2.0
// Short messages of this pack: at the bottom of the page, where nothing of the front end's lies. Its own toasts and its
// box for errors share the top right corner and cover each other, and its toasts take no more than one button.
//
// What a message says may come from files and is set as text that hides nothing (visible.js).

import { visible } from "./visible.js";

const STYLE_ID = "nvfp4-toast-style";
const LONGEST = 2000;
const ICONS = { error: "pi pi-times-circle", warning: "pi pi-exclamation-triangle", info: "pi pi-info-circle" };
const STYLE = `
.nvfp4-toasts {
  position: fixed; z-index: 1100; left: 50%; bottom: 0.75rem; transform: translateX(-50%); pointer-events: none;
  display: flex; flex-direction: column; gap: 0.5rem; width: min(27rem, calc(100vw - 2rem));
}
.nvfp4-toast {
  --nd-text: var(--base-foreground, var(--fg-color));
  box-sizing: border-box; position: relative; pointer-events: auto; padding: 0.75rem 2.5rem 0.75rem 0.875rem;
  border: 1px solid var(--border-default, var(--border-color)); border-left: 4px solid var(--nd-tone);
  border-radius: 0.5rem; background: var(--comfy-menu-bg); color: var(--nd-text);
  box-shadow: 0 4px 16px #0006; font-size: 0.8125rem; line-height: 1.45; overflow-wrap: anywhere;
}
.nvfp4-toast[data-kind=error] { --nd-tone: #e5484d; }
.nvfp4-toast[data-kind=warning] { --nd-tone: #d9860a; }
.nvfp4-toast[data-kind=info] { --nd-tone: #3b82f6; }
.nvfp4-toast strong { display: block; font-weight: 600; }
.nvfp4-toast strong i { margin-right: 0.5rem; color: color-mix(in srgb, var(--nd-tone) 60%, var(--nd-text)); }
.nvfp4-toast p { margin: 0.25rem 0 0; max-height: 30vh; overflow-y: auto; user-select: text; white-space: pre-wrap; }
.nvfp4-toast div { display: flex; flex-wrap: wrap; gap: 0.375rem; margin-top: 0.5rem; }
.nvfp4-toast button {
  padding: 0.3rem 0.6rem; font: inherit; color: inherit; cursor: pointer; background: transparent;
  border: 1px solid var(--border-default, var(--border-color)); border-radius: 0.375rem;
}
.nvfp4-toast button:hover { background: var(--secondary-background, var(--comfy-input-bg)); }
.nvfp4-toast > button { position: absolute; top: 0.375rem; right: 0.375rem; border-color: transparent; }
.nvfp4-toast :focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); outline-offset: 2px; }
`;

/**
 * Show a message in place of the one with the same `id`. `kind`: error, warning or info; `paragraphs`: sentences;
 * `actions`: [label, function], each of which closes it; `close`: the label of the cross; `life`: milliseconds, or
 * undefined for one that stays.
 */
export function showToast({ id, kind, title, paragraphs = [], actions = [], close, life }) {
  addStyle();
  dismissToast(id);
  const toast = element("section", { className: "nvfp4-toast" }, { role: "alert" });
  Object.assign(toast.dataset, { id, kind });
  const icon = element("i", { className: ICONS[kind] }, { "aria-hidden": "true" });
  const heading = element("strong");
  heading.append(icon, visible(title, LONGEST));
  const shown = paragraphs.filter(Boolean).map((text) => element("p", { textContent: visible(text, LONGEST) }));
  const buttons = element("div");
  for (const [label, run] of actions) {
    const click = () => (dismissToast(id), run());
    buttons.append(element("button", { type: "button", textContent: label, onclick: click }));
  }
  const cross = element("button", { type: "button", onclick: () => dismissToast(id) }, { "aria-label": close });
  cross.append(element("i", { className: "pi pi-times" }, { "aria-hidden": "true" }));
  toast.append(heading, ...shown, ...(actions.length ? [buttons] : []), cross);
  stack().append(toast);
  if (life) setTimeout(() => toast.remove(), life);
}

export function dismissToast(id) {
  for (const toast of document.querySelectorAll(".nvfp4-toast")) if (toast.dataset.id === id) toast.remove();
}

function stack() {
  const there = document.querySelector(".nvfp4-toasts");
  if (there) return there;
  const made = element("div", { className: "nvfp4-toasts" });
  document.body.append(made);
  return made;
}

function element(tag, properties = {}, attributes = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function addStyle() {
  if (document.getElementById(STYLE_ID)) return;
  document.head.append(Object.assign(document.createElement("style"), { id: STYLE_ID, textContent: STYLE }));
}
