// SPDX-License-Identifier: Apache-2.0
// Text of others on its way to the page: names and notes from files, facts of the machine, ids of a prompt.
//
// What the routes answer is data. Everything is set as text and never as HTML; this function makes visible what would
// not look like itself as text, and leaves out the middle of what is longer than anybody reads. measure/escape.py does
// the same for what the server writes.

const LONGEST = 20000;
const HIDDEN = /[^\P{C}\n]|[\p{Zl}\p{Zp}]/gu; // controls, directions, no width, halves of pairs; a line break is one

/** Any value -> text in which nothing is hidden: U+001B becomes \x1b, U+202E \u202e. */
export function visible(value, longest = LONGEST) {
  let text = String(value ?? "");
  if (text.length > longest) {
    const head = Math.floor((2 * longest) / 3);
    text = `${text.slice(0, head)} [... ${text.length - longest} characters ...] ${text.slice(head - longest)}`;
  }
  return text.replace(HIDDEN, named);
}

function named(char) {
  const code = char.codePointAt(0);
  const [mark, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
  return `\\${mark}${code.toString(16).padStart(digits, "0")}`;
}
