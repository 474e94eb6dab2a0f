// SPDX-License-Identifier: Apache-2.0
// A report as DOM: text in, an element out. No knowledge of nodes and graphs; reports.js has it.
//
// Everything is set as text that hides nothing (visible.js): names in a report come from files. Words are never
// broken: prose wraps between words and after the separators of paths, tables keep their columns and scroll sideways.

import { visible } from "./visible.js";

const STYLE_ID = "nvfp4-report-style";
const STYLE = `
.nvfp4-report { position: relative; }
.nvfp4-report > div {
  position: absolute; inset: 0; display: flex; flex-direction: column; border-radius: 6px;
  background: var(--component-node-widget-background, var(--comfy-input-bg));
  color: var(--component-node-foreground, var(--input-text));
  font: 12px/1.45 Inter, system-ui, sans-serif; text-align: left;
}
.nvfp4-report [tabindex] {
  flex: 1; min-height: 0; overflow: auto; overscroll-behavior: contain; scrollbar-width: thin; user-select: text;
  cursor: text;
}
.nvfp4-report [tabindex] > div { padding: 6px 8px; }
.nvfp4-report p { margin: 0; padding-left: calc(var(--nvfp4-indent, 0) * 0.45em + 0.9em); text-indent: -0.9em; }
.nvfp4-report p:first-child { padding-left: 0; text-indent: 0; font-weight: 600; }
.nvfp4-report p:empty { height: 0.6em; }
.nvfp4-report pre {
  margin: 2px 0; padding: 0 0 4px; overflow-x: auto; scrollbar-width: thin; white-space: pre;
  font: 11px/1.45 ui-monospace, Menlo, Consolas, monospace;
}
.nvfp4-report .nvfp4-word { white-space: nowrap; }
.nvfp4-report a { padding: 2px 8px 5px; color: inherit; text-decoration: underline; }
.nvfp4-report a:empty { display: none; }
.nvfp4-report :focus-visible { outline: 1px solid var(--p-primary-color, #3b82f6); }
`;
const LONG_WORD = 36; // of a node 310 pixels wide nearly a line
const MAX_HEIGHT = 260;
const LONGEST = 200000; // characters, as the server sends them at most

/**
 * `urlOf`: the picture of an output, a query string of /view -> its address; `texts()` -> promise of texts.js' function.
 *
 * Returns `.element`; `.show(text, picture)`, the picture being the large one that a link opens, or undefined;
 * `.text()`, what is shown; and `.onHeight(call)`: call(least, whole) in pixels whenever the height of what is shown
 * changes. A long report scrolls from `least` on, and has no use for more than `whole`.
 */
export function createReport(urlOf, texts) {
  addStyle();
  const body = document.createElement("div");
  const link = Object.assign(document.createElement("a"), { target: "_blank", rel: "noopener" });
  const scroller = Object.assign(document.createElement("div"), { tabIndex: 0 });
  scroller.dataset.captureWheel = "true"; // the Vue renderer zooms otherwise
  scroller.append(body);
  const frame = document.createElement("div");
  frame.append(scroller, link);
  const element = Object.assign(document.createElement("div"), { className: "nvfp4-report" });
  element.append(frame);
  let shown = "";

  return {
    element,
    text: () => shown,
    show(text, picture) {
      shown = visible(text, LONGEST);
      body.replaceChildren(...blocks(shown));
      link.replaceChildren();
      if (!picture) return;
      link.href = urlOf(picture);
      texts().then((translate) => (link.textContent = translate("largePicture")));
    },
    onHeight(call) {
      const observer = new ResizeObserver(() => {
        if (!body.offsetHeight) return; // not on the screen just now
        const whole = body.offsetHeight + link.offsetHeight;
        const least = Math.min(whole, MAX_HEIGHT);
        element.style.minHeight = `${least}px`;
        call(least, whole);
      });
      observer.observe(body);
      observer.observe(link);
    },
  };
}

/** Neighbouring lines with columns become one table, every other line a paragraph. */
function blocks(text) {
  const lines = text.split("\n");
  const columns = lines.map((line) => /\S {2,}\S/.test(line));
  const inTable = columns.map((has, index) => has && (columns[index - 1] || columns[index + 1]));
  const elements = [];
  lines.forEach((line, index) => {
    if (!inTable[index]) elements.push(paragraph(line));
    else if (inTable[index - 1]) elements.at(-1).textContent += `\n${line}`;
    else elements.push(Object.assign(document.createElement("pre"), { textContent: line }));
  });
  return elements;
}

function paragraph(line) {
  const element = document.createElement("p");
  const words = line.trimStart();
  element.style.setProperty("--nvfp4-indent", line.length - words.length);
  for (const word of words.split(/(\s+)/)) {
    if (word.length >= LONG_WORD) element.append(...breakable(word));
    else element.append(/[-/]/.test(word) ? whole(word) : word);
  }
  element.normalize();
  return element;
}

/** A flag or a short compound, at whose hyphens browsers would wrap. */
function whole(word) {
  return Object.assign(document.createElement("span"), { className: "nvfp4-word", textContent: word });
}

/** A path or a file name: it may wrap after its separators, and a copy of it stays the same. */
function breakable(word) {
  const parts = word.split(/(?<=\w[/\\_.,:-])(?=\w)/);
  return parts.flatMap((part, index) => (index ? [document.createElement("wbr"), part] : [part]));
}

function addStyle() {
  if (document.getElementById(STYLE_ID)) return;
  document.head.append(Object.assign(document.createElement("style"), { id: STYLE_ID, textContent: STYLE }));
}
