# SPDX-License-Identifier: Apache-2.0
"""The texts of the notes in the shipped workflows: (title, Markdown), wrapped here, made one line by ``flow``.

What has to be read before the first run stands first and fits the note; the rest is below, for whoever scrolls.
"""

from __future__ import annotations

import re

from .workflow_files import (
    DISTILLED_FP8,
    DISTILLED_LORA,
    GEMMA_3,
    GIGABYTES,
    HUB,
    LTX_23,
    LTX_23_FP8,
    LTX_25,
    Choice,
    File,
)

# A line that begins a paragraph, a list item, a heading or a row of a table.
_BEGINS = re.compile(r"(-|\d+\.|#+|\|) ?")
_CODE = re.compile(r"`([^`\n]+)`")


def flow(text: str) -> str:
    """Wrapped Markdown -> one line a paragraph and list item, since the front end keeps line breaks.

    What is code becomes bold: the newer renderer of front end 1.49 draws code in blue on grey, unreadable in a note.
    """
    lines: list[str] = []
    for line in text.strip().splitlines():
        if lines and lines[-1] and line.strip() and not _BEGINS.match(line):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.rstrip())
    return _CODE.sub(r"**\1**", "\n".join(lines))


def _table(*files: File) -> str:
    """Every file once, with its size and folder, and what all need together."""
    listed = dict.fromkeys(files)
    rows = [
        f"| [{name}]({address}) | {GIGABYTES[name, address, folder]:g} | {folder} |" for name, address, folder in listed
    ]
    total = sum(GIGABYTES[file] for file in listed)
    return "\n".join([f"| File, {total:.0f} GB in all | GB | models/ |", "|---|---|---|", *rows])


def _files(choice: Choice, upscaler: bool = False, audio: bool = True) -> str:
    files = [choice.model, *choice.vaes[: 2 if audio else 1], choice.encoder]
    return _table(*files, *([choice.lora] if choice.lora else []), *([choice.upscaler] if upscaler else []))


DOWNLOAD = "If files are missing: *View details* at the upper right, then *Download all*."
WRITE = "Write the **prompt**: what happens in order, what is seen, what is heard, speech in quotes."
RUN = "Press **Run**. The clip is saved under `output/video`."
CLOUDY = """
### Why this file looks better here

Lightricks' *dev* file with the distilled LoRA is often called "cloudy". Stock ComfyUI adds a LoRA to the decoded
weights and rounds the sum to four bits again: 17 % of error in each Linear, measured with a LoRA of rank 64 and
random weights. Here the LoRA is added while weights are decoded: 0.3 %. That is the likeliest cause; **with the real
files neither was run**. If your download of the NVFP4 file has no VAEs in it, the loaders say so: choose
`ltx-2.3-22b-dev-fp8.safetensors` in *VAEs, projection*.
"""
NUMBERS = """
### What the numbers do

- **card**: your GPU's memory sets size and length to what it samples within two minutes, by the planner.
- **width, height**: multiples of {step}; **seconds**: the frames become 8k + 1. Other values are moved to the nearest,
  and the settings node in the subgraph says so.
- **compute**: `bf16` is exact and runs everywhere. `fp8` is faster on RTX 40, 50 and later, 0.2 % off in the latents.
- 8 steps at cfg 1 with the sigmas the model was distilled for; they are set inside. The negative prompt is not used.
"""
TROUBLE = """
### If something looks wrong

- Open the subgraph with the button at its upper right, *Enter* below it in the newer look: *Launch Guard*,
  *Sharpness* and the settings say what they found. NVFP4 Doctor in the sidebar says it, too.
- Blurred: a preview decoder (`taeltx`) instead of the full VAE; the VAE loader refuses it.
- Leave VAE Decode as it is: it decodes in chunks of time, exactly, and goes on in tiles by itself if memory runs out.

The template's thumbnail is a picture of this graph, not of a clip.
"""


def _note(intro: str, files: str, steps: list[str], *more: str, step: int = 32) -> str:
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate([DOWNLOAD, *steps], 1))
    parts = (intro, f"### Steps\n\n{numbered}", files, *more, NUMBERS.format(step=step), TROUBLE)
    return "\n\n".join(part.strip() for part in parts)


LTX25 = (
    "NVFP4 Video: LTX-2.5, text to video with sound",
    _note(
        "Lightricks' own NVFP4 file of LTX-2.5. 8 steps at half the size, the latent enlarged twice, 3 more steps: "
        f"1280 x 704, 5 seconds, with sound. Accept the licence at [Lightricks/LTX-2.5]({HUB}/Lightricks/LTX-2.5) "
        "before you download.",
        _files(LTX_25, upscaler=True), [WRITE, RUN],
        """
### About these files

- The transformer says nowhere in its header that it is NVFP4, and stock ComfyUI stops at its first layer. NVFP4 Model
  Loader knows Lightricks' header. For a copy without it set `dialect` to `comfy`.
- The video VAE is the full one, a diffusion decoder.
- **enhance prompt** lets the text encoder write your prompt out first, which takes a minute or two; nothing more is
  downloaded. ComfyUI's own template has a second, smaller Gemma for that.
- **Not run with the released files**: none can be had where this pack was built.
""",
        step=64,
    ),
)  # fmt: skip
TWO_STAGE = (
    "NVFP4 Video: LTX-2.3, text to video with sound",
    _note(
        "Lightricks' own NVFP4 file of LTX-2.3 *dev* and the LoRA that makes it a distilled model, at 0.5. 8 steps at "
        "half the size, the latent enlarged twice, 3 more steps: 1280 x 704, 5 seconds, with sound.",
        _files(LTX_23, upscaler=True), [WRITE, RUN], CLOUDY, step=64,
    ),
)  # fmt: skip
I2V = (
    "NVFP4 Video: LTX-2.3, image to video with sound",
    _note(
        "The clip starts with your picture. Lightricks' own NVFP4 file of LTX-2.3 *dev* and the LoRA that makes it a "
        "distilled model, at 0.5. 8 steps: 768 x 512, 5 seconds, with sound.",
        _files(LTX_23),
        [
            "Load the **picture**. It is scaled and cut to *width* x *height*: set those to its shape.",
            "Write the **prompt**: what happens from there on, and what is heard.", RUN,
        ],
        CLOUDY,
    ),
)  # fmt: skip
ONE_STAGE = (
    "NVFP4 Video: LTX-2.3, small and quick",
    _note(
        "One stage, nothing to upscale: 8 steps, 768 x 512, 5 seconds, with sound. Lightricks' own NVFP4 file of "
        "LTX-2.3 *dev* and the LoRA that makes it a distilled model, at 0.5.",
        _files(LTX_23), [WRITE, RUN], CLOUDY,
    ),
)  # fmt: skip
SILENT = (
    "NVFP4 Video: LTX-2.3 without sound",
    _note(
        "Without an audio latent a step takes less memory and time: 8 steps, 768 x 512, 5 seconds, silent. Lightricks' "
        "own NVFP4 file of LTX-2.3 *dev* and the LoRA that makes it a distilled model, at 0.5.",
        _files(LTX_23, audio=False), ["Write the **prompt**: what happens in order, and what is seen.", RUN], CLOUDY,
        "ComfyUI before 0.30 cannot sample LTX-2 without an audio latent; the guard says so. There, take a template "
        "with sound.",
    ),
)  # fmt: skip
OTHERS = f"""
### Other files

- One that you made (template 7), or *distilled 1.1* in BF16
  ([ltx-2.3-22b-distilled-1.1]({HUB}/Lightricks/LTX-2.3/resolve/main/ltx-2.3-22b-distilled-1.1.safetensors), 46 GB, the
  better source): choose it in *checkpoint*, everything comes from it.
- Of other people, not checked here: [Sulphur 2]({HUB}/coolthor/Sulphur-2-distilled-NVFP4), a fine-tune,
  [distilled, transformer only]({HUB}/Winnougan/LTX-2.3-INT8), [many formats]({HUB}/Hippotes/LTX-2.3-various-formats).
  They have no VAEs: open the subgraph and choose the file in the model loader alone.
- Of a file that is NVFP4 already nothing is made.
"""
DISTILLED = (
    "NVFP4 Video: LTX-2.3 distilled, with sound",
    _note(
        "**Every part but the text encoder comes from one file, Lightricks' FP8 checkpoint; its NVFP4 file is made "
        "from it on the first run**, once, in minutes, under `output/diffusion_models` (17.6 GB more). 8 steps, "
        "768 x 512, 5 seconds, with sound.",
        _files(LTX_23_FP8), [WRITE, RUN + " The first run quantizes, and shows how far it is."], OTHERS,
    ),
)  # fmt: skip
MAKE_CHOICES = {"contents": "whole checkpoint", "quality": "best"}
MAKE = (
    "NVFP4 Video: make an NVFP4 file",
    f"""
From one checkpoint in BF16, FP16, FP32 or FP8 to its NVFP4 file, and VAEs in files of their own. Memory for one tensor
is enough. As it stands: Lightricks' distilled LTX-2.3 in FP8 becomes a whole checkpoint of about 22 GB.

### Steps

1. {DOWNLOAD}
2. Choose the **checkpoint**; an empty *name* means its own. *estimate_only* tells size and time, and writes no NVFP4
   file.
3. Press **Run**. It takes minutes; a run that you cancel continues where it stopped.
4. The new files are in the lists of all loaders at once: NVFP4 in `output/checkpoints`, the video VAE in `output/vae`.

{_table(DISTILLED_FP8)}

BF16 makes the better source, since nothing is rounded twice:
[ltx-2.3-22b-distilled-1.1]({HUB}/Lightricks/LTX-2.3/resolve/main/ltx-2.3-22b-distilled-1.1.safetensors), 46 GB.

### What you see

- **What is in the file**: components, formats by block, what stock ComfyUI does with it.
- **Does it fit**: what is in GPU memory when, and whether NVFP4 will change size, speed or both. *gpu* also takes a
  card that you only think of buying.
- **What was made**: layers quantized and kept, and why; a model card beside the file has all of it.

*protect_audio* keeps the audio branch as it is, for a voice that sounds robotic; the file grows. To split without
quantizing, open the subgraph and bypass NVFP4 Quantize (Ctrl + B).

The template's thumbnail is a picture of this graph.
""",
)
COMPARE = (
    "NVFP4 Video: FP8 against NVFP4",
    f"""
What does NVFP4 cost? **Every part but the text encoder comes from one FP8 checkpoint; B is made from it on the first
run**, once, in minutes. The same prompt, size, sigmas and seed are sampled with both, three seeds, and each pair gets a
comparison card and a film of both side by side.

### Steps

1. {DOWNLOAD}
2. Press **Run**. Six clips are sampled, so this takes six times as long as one. All is saved under `output/nvfp4`.
3. Read the three cards together: what all of them show comes from the format, what one shows comes from its seed.

{_files(LTX_23_FP8)}

### What is in a card

- A (left) is the clip to trust, B (right) the one under test. PSNR, SSIM and the difference map say how far they are
  apart; that is not the same as worse: a distilled model answers small changes of its weights with another composition.
- Sharpness: B against A, frame by frame. Softer in all three seeds is a loss.
- Sound: level, spectral distance, sync. The films have the sound of B.

*compute* is how B computes; the FP8 layers of A take ComfyUI's own path. *seed* is that of the first pair. On a card
that cannot hold both models ComfyUI swaps them, which takes time but changes nothing in the clips.

The template's thumbnail is a picture of this graph.
""",
)
CALIBRATE = (
    "NVFP4 Video: make a calibrated NVFP4 file",
    f"""
An NVFP4 file, rounded so that what its layers **put out** changes least: for that the source is watched while it
samples your own prompts. Same size, same speed. Every part but the text encoder comes from one file, Lightricks'
distilled LTX-2.3 in FP8.

### Steps

1. {DOWNLOAD}
2. **Collect**: write a **prompt** of the kind that you use, press **Run**; change it, Run again. Four to eight clips
   are enough. The calibration file is written, and grows, at the end of each one.
3. **Quantize and verify**: hold Ctrl and draw around the three boxes of group 2, press **Ctrl + M** to unmute them,
   then **Run**.
4. *Is it right* says whether the file is in order, and the error of its outputs. It is in all loaders' lists at once.

{_table(DISTILLED_FP8, GEMMA_3)}

### Good to know

- Another checkpoint: choose it in both groups, and its `_calibration` file in the second. BF16 is the better source.
- After a restart of ComfyUI collecting begins anew and stops at the file that is there: mute group 1 to use that, or
  switch *overwrite* on in NVFP4 Calibrate.
- **budget**: `balanced` spends a tenth more bytes on the layers that gain most; empty, every layer of the recipe is
  NVFP4; `24gb-card`, or a size such as `20GB`.
- **memory_gb**: with more of it columns are compared in wider blocks, which is better. 3.5 GB for blocks of 128.
- Quantizing takes minutes on a GPU and can be cancelled; it continues.

### With a LoRA folded in

Open *Sample and collect*, un-bypass *LoRA to fold in* (Ctrl + B), choose it and its strength; set the same *LoRA* and
*LoRA strength* in group 2. So Lightricks' dev checkpoint with its distilled LoRA
([{DISTILLED_LORA[0]}]({DISTILLED_LORA[1]}), {GIGABYTES[DISTILLED_LORA]:g} GB, models/loras) at 0.5 becomes one
distilled file. Collect anew after every change of the LoRA.

What calibration is worth for LTX has not been measured; on a text model it takes 40 % and more off the outputs' error.

The template's thumbnail is a picture of this graph.
""",
)
