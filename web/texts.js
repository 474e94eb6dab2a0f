// SPDX-License-Identifier: Apache-2.0
// Texts of the NVFP4 Doctor in the user's language.
//
// ComfyUI merges locales/<language>/main.json of every pack into the answer of GET /i18n; ours sit under "nvfp4Doctor".
// The front end's own translate function is not open to extensions, so the panel looks its texts up here.

const SECTION = "nvfp4Doctor";

/**
 * The answer of /i18n (null if there is none) and a language tag -> a function (key, values, fallback) -> text.
 *
 * A key is dotted ("severity.error"). Missing in the language, it is looked up in the language's base ("pt-BR": "pt"),
 * then in English; missing there too, the fallback is shown, by default the key itself in words.
 */
export function translator(messages, locale) {
  const language = String(locale || "en");
  const sources = [language, language.split("-")[0], "en"].map((tag) => messages?.[tag]?.[SECTION]);
  return (key, values = {}, fallback = inWords(key)) => {
    const found = sources.map((source) => lookUp(source, key)).find((text) => typeof text === "string");
    return (found ?? fallback).replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
  };
}

function lookUp(source, key) {
  return key.split(".").reduce((branch, part) => branch?.[part], source);
}

/** "severity.copyCommand" -> "Copy command" */
function inWords(key) {
  const words = key.split(".").pop().replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase();
  return words.charAt(0).toUpperCase() + words.slice(1);
}
