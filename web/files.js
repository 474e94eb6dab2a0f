// SPDX-License-Identifier: Apache-2.0
// Model files that a node of this pack has written appear in the lists of all nodes, without pressing R.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

app.registerExtension({
  name: "nvfp4-video.files",
  setup() {
    api.addEventListener("nvfp4.files", () => app.refreshComboInNodes?.());
  },
});
