# SPDX-License-Identifier: Apache-2.0
"""The texts of the notes in the shipped workflows: (title, Markdown), wrapped here, made one line by ``flow``."""

from __future__ import annotations

import re

HUB = "https://huggingface.co"
MAKE_IT = "made once with the template `make_nvfp4`"
NVFP4_ROW = f"| NVFP4 Model Loader | `ltx-2.3-22b-distilled_nvfp4.safetensors`, {MAKE_IT} | `output/checkpoints` |"
GEMMA_ROW = (
    "| Text encoder, first line | [gemma_3_12B_it_fp4_mixed.safetensors]"
    f"({HUB}/Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors) | "
    "`models/text_encoders` |"
)
FP8_ROW = (
    "| {where} | [ltx-2.3-22b-distilled-fp8.safetensors]"
    f"({HUB}/Lightricks/LTX-2.3-fp8/resolve/main/ltx-2.3-22b-distilled-fp8.safetensors) | `models/checkpoints` |"
)
# A line that begins a paragraph, a list item, a heading or a row of a table.
_BEGINS = re.compile(r"(-|\d+\.|#+|\|) ?")
HEAD = "| Where | File | Folder |\n|---|---|---|"


def flow(text: str) -> str:
    """Wrapped Markdown -> one line a paragraph and list item, since the front end keeps line breaks."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        if lines and lines[-1] and line.strip() and not _BEGINS.match(line):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.rstrip())
    return "\n".join(lines)


def _files_23(*further: str, vaes: str = "both VAEs") -> str:
    rows = [HEAD, NVFP4_ROW, GEMMA_ROW, FP8_ROW.format(where=f"Text encoder, second line; {vaes}"), *further]
    return "### Files\n\n" + "\n".join(rows)


FILE_HINTS = """
- There is no address for the NVFP4 file: several people publish one, in different dialects. Make it from the FP8 file
  with `make_nvfp4`, or choose one that you have; the loader reads them all, and its report says what it found. A *dev*
  model is not made for these 8 steps.
- The NVFP4 file that `make_nvfp4` writes is a whole checkpoint: choose it in all loaders, and the FP8 file is not
  needed any more. Until then only its text projection and VAEs are read.
- Use the full VAE. A preview decoder (`taeltx`) is several times softer; the VAE loader refuses it.
"""
AGREE = """
### What must agree

NVFP4 Distilled Settings sends the same numbers to all nodes, and its text says what it changed.

- **Distilled: 8 steps, cfg 1.** The sigmas are those the model was trained for; a scheduler with 8 steps gives others.
  At cfg 1 the negative prompt is not used.
- **Frames: 8k + 1** (97, 121, 161, ...). **Width and height: multiples of {step}.**
- **One frame rate** for conditioning{audio} and video.
"""
TROUBLE = """
### If something looks wrong

- Crashed or stopped: read the text of NVFP4 Launch Guard. Set it to `cure` if it names the prefetch crash.
- Blurred: read the text of NVFP4 Sharpness, then look at the VAE in group 3.
- Model refused: the message says what was found and which field decides.

The template's thumbnail is a picture of this graph, not of a clip.
"""
SOUND = ", audio latent"
RUN = (
    "1. Choose the files in groups 1 and 3.\n2. Set size, length and frame rate in group 2.\n"
    "3. Write the prompt: what happens in order, what is seen, what is heard, speech in quotes.\n"
    "4. Run. The clip is saved under `output/video`."
)


def _note(intro: str, files: str, steps: str, agree: str, hints: str = FILE_HINTS) -> str:
    parts = (intro, files + "\n" + hints.rstrip(), f"### Steps\n\n{steps}", agree.strip(), TROUBLE.strip())
    return "\n\n".join(part.strip() for part in parts)


T2V = (
    "NVFP4 Video: text to video with sound",
    _note(
        "One stage, distilled LTX-2.3: picture and sound in 8 steps. 768 x 512, 121 frames at 24 fps, 5 seconds.",
        _files_23(), RUN, AGREE.format(step=32, audio=SOUND),
    ),
)  # fmt: skip
TWO_STAGE = (
    "NVFP4 Video: text to video in two stages",
    _note(
        "Distilled LTX-2.3 in two stages: 8 steps at half the size, the latent enlarged twice, 3 more steps. "
        "1280 x 704, 121 frames at 24 fps. The sound is sampled in both stages.",
        _files_23(
            "| Latent upscaler | [ltx-2.3-spatial-upscaler-x2-1.1.safetensors]"
            f"({HUB}/Lightricks/LTX-2.3/resolve/main/ltx-2.3-spatial-upscaler-x2-1.1.safetensors) | "
            "`models/latent_upscale_models` |"
        ),
        RUN, AGREE.format(step=64, audio=SOUND) + "- **Width and height are those of the finished clip**; the settings "
        "node halves them for the first stage.\n- Leave VAE Decode as it is: it decodes in chunks of time, exactly, "
        "and goes on in tiles by itself if memory runs out.\n",
    ),
)  # fmt: skip
I2V = (
    "NVFP4 Video: image to video with sound",
    _note(
        "One stage, distilled LTX-2.3: the clip starts with your picture. 768 x 512, 121 frames at 24 fps, 5 seconds.",
        _files_23(),
        "1. Choose the files in groups 1 and 4.\n2. Load the picture in group 3. It is scaled and cut to the size of "
        "the clip, so set one of the same shape in group 2.\n3. Write what happens from there on, and what is heard.\n"
        "4. Run. The clip is saved under `output/video`.",
        AGREE.format(step=32, audio=SOUND) + "- `img_compression` makes the picture look like a frame of a video; "
        "without it clips tend to stand still. `strength` below 1 lets the first frame change.\n",
    ).replace("VAE in group 3", "VAE in group 4"),
)  # fmt: skip
VIDEO_ONLY = (
    "NVFP4 Video: text to video without sound",
    _note(
        "One stage, distilled LTX-2.3 without an audio latent: the silent clip takes less memory and less time a step. "
        "768 x 512, 121 frames at 24 fps, 5 seconds.",
        _files_23(vaes="VAE"),
        RUN.replace(", what is heard, speech in quotes", ""), AGREE.format(step=32, audio=""),
    ) + "\n\nComfyUI before 0.30 cannot sample LTX-2 without an audio latent; the guard says so. There, take the "
    "template with sound.",
)  # fmt: skip
LTX25 = (
    "NVFP4 Video: LTX-2.5, text to video with sound",
    _note(
        "One stage, distilled LTX-2.5, whose parts are files of their own. 768 x 512, 121 frames at 24 fps, 5 seconds.",
        "### Files\n\n" + "\n".join(
            [HEAD] + [
                f"| {where} | [{name}]({HUB}/Lightricks/LTX-2.5/resolve/main/{folder}/{name}) | `models/{folder}` |"
                for where, folder, name in (
                    ("NVFP4 Model Loader", "diffusion_models", "ltx-2.5-22b-distilled-transformer-nvfp4.safetensors"),
                    ("Load CLIP", "text_encoders", "gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors"),
                    ("Video VAE", "vae", "ltx-2.5-video-vae-bf16.safetensors"),
                    ("Audio VAE", "vae", "ltx-2.5-audio-vae-bf16.safetensors"),
                )
            ]
        ),
        RUN, AGREE.format(step=32, audio=SOUND),
        hints=f"""
- The files are behind a licence: accept it at [Lightricks/LTX-2.5]({HUB}/Lightricks/LTX-2.5) first.
- The transformer says nowhere in its header that it is NVFP4, and stock ComfyUI stops at its first layer. NVFP4 Model
  Loader knows Lightricks' header. For a copy without it set `dialect` to `comfy`.
- The video VAE is the full one, a diffusion decoder.
- Not run with the released files: none can be had where this pack was built.
""",
    ),
)  # fmt: skip
MAKE = (
    "NVFP4 Video: make an NVFP4 file",
    f"""
From the FP8 checkpoint (29 GB) to a whole NVFP4 checkpoint of about 19.5 GB, and VAEs in files of their own. Memory
for one tensor is enough.

### File

{HEAD}
{FP8_ROW.format(where="All four nodes")}

BF16 makes the better source, since nothing is rounded twice:
[ltx-2.3-22b-distilled-1.1.safetensors]({HUB}/Lightricks/LTX-2.3/resolve/main/ltx-2.3-22b-distilled-1.1.safetensors),
46 GB. Any fine-tune in BF16, FP16, FP32 or FP8 will do as well.

### Steps

1. Choose the same file in all four nodes.
2. To know first what comes out, set `estimate_only` on NVFP4 Quantize and bypass NVFP4 Split (Ctrl + B).
3. Run. Quantising takes minutes; a run that you cancel goes on where it stopped.
4. The other templates find `ltx-2.3-22b-distilled_nvfp4.safetensors` at once: NVFP4 Quantize writes into
   `output/checkpoints`, where loaders look too.

### What the nodes say

- **Inspect**: components, formats by block, what stock ComfyUI does with the file.
- **Planner**: what is in GPU memory when, whether it fits, and whether NVFP4 will change size, speed or both. `gpu`
  also takes one that you only think of buying.
- **Quantize**: layers quantised and kept, and why; a model card beside the file has all of it.
- **Split**: the full video VAE (`output/vae`) and the audio VAE (`output/checkpoints`) for workflows that want them
  alone.

`protect_audio` keeps the audio branch as it is, for a voice that sounds robotic; the file grows.

The template's thumbnail is a picture of this graph.
""",
)
COMPARE = (
    "NVFP4 Video: FP8 against NVFP4",
    f"""
What does NVFP4 cost? The same prompt, size, sigmas and seed are sampled with both files, three seeds, and each pair
gets a comparison card. Only the model file differs.

### Files

{HEAD}
{FP8_ROW.format(where="A, the upper model loader; text encoder, second line; both VAEs")}
| B, the lower one | `ltx-2.3-22b-distilled_nvfp4.safetensors`, {MAKE_IT} | `output/checkpoints` |
{GEMMA_ROW}

### Steps

1. Choose the files in groups 1 and 3.
2. Run. Six clips are sampled, so this takes six times as long as one. The cards are saved under `output/nvfp4`.
3. Read the three cards together: what all of them show comes from the format, what one shows comes from its seed.

### What is in a card

- A is the clip to trust, B the one under test. PSNR, SSIM and the difference map say how far they are apart; that is
  not the same as worse: a distilled model answers small changes of its weights with another composition.
- Sharpness: B against A, frame by frame. Softer in all three seeds is a loss.
- Sound: level, spectral distance, sync.

B computes in `bf16`; the FP8 layers of A take ComfyUI's own path. To compare ways of computing instead, choose the
NVFP4 file twice and another `compute` in B. Each *Seed* node is a subgraph: open it with the button at its upper
right.

On a card that cannot hold both models ComfyUI swaps them, which takes time but changes nothing in the clips.

The template's thumbnail is a picture of this graph.
""",
)
