// SPDX-License-Identifier: Apache-2.0
// What the pack's extensions ask the host: its routes, the user's settings, its texts in the user's language.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { translator } from "./texts.js";

/** This pack's nodes as /object_info names their origin: the folder under which this very file is served. */
export const ORIGIN = `custom_nodes.${decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2))}`;

let messages = null;

/** A route of the host -> its JSON, or null if it does not answer, refuses, or lacks the route. */
export async function request(route, options) {
  try {
    const answer = await api.fetchApi(route, options);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** The function that looks a text up in the user's language; /i18n is asked once. */
export async function texts() {
  messages ??= await request("/i18n");
  return translator(messages, setting("Comfy.Locale"));
}

/** The value of one of the front end's settings. */
export function setting(id) {
  return app.extensionManager?.setting?.get(id);
}
