# SPDX-License-Identifier: Apache-2.0
"""What calibration is worth on a second trained model, of another kind: Silero VAD, which tells speech from silence.

Four convolutions and an LSTM, their weights taken as six matrices (a convolution's by its unfolded input). The weights
are the safetensors file of the package silero-vad, read as data: nothing of the package runs. Calibrated on some
recordings of speech, each at three levels, judged on others. The rows are those of calibration.py, whose code packs:

* weight error, output MSE, held out: as there, means of the six
* probability: mean absolute difference of what the model says, for chunks of 32 ms, from the unquantised model's

    pip download --no-deps silero-vad, and unpack it; recordings of 16 kHz come with the source of pocketsphinx
    python benchmarks/calibration_audio.py --weights silero_vad/data/silero_vad_16k.safetensors --speech test/data
"""

from __future__ import annotations

import sys
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import calibration
import common

CHUNK, CONTEXT, RATE = 512, 64, 16_000
LEVELS = (0.3, 1.0, 2.0)
STRIDES = {"conv1": 1, "conv2": 2, "conv3": 2, "conv4": 1}
MATRICES = (*STRIDES, "lstm_ih", "lstm_hh")


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """File -> the six matrices (N, K), K padded to a multiple of 16; all other tensors."""
    import torch
    from safetensors.torch import load_file

    found = {name: tensor.float() for name, tensor in load_file(path).items()}
    rows = {name: found.pop(f"{name}.weight").flatten(1) for name in STRIDES}
    rows |= {name: found.pop(f"lstm_cell.weight_{name[-2:]}") for name in ("lstm_ih", "lstm_hh")}
    return {name: torch.nn.functional.pad(w, (0, -w.shape[1] % 16)) for name, w in rows.items()}, found


def run(matrices: Mapping[str, Any], rest: Mapping[str, Any], sound: Any, see: Callable | None = None) -> Any:
    """(samples,) -> (chunks,) probability of speech; ``see(name, inputs)`` gets what each matrix multiplies."""
    import torch
    from torch.nn.functional import conv1d, pad

    def linear(name: str, inputs: Any, bias: Any) -> Any:
        inputs = pad(inputs, (0, matrices[name].shape[1] - inputs.shape[1]))
        if see is not None:
            see(name, inputs)
        return inputs @ matrices[name].t() + bias

    sound = pad(sound, (CONTEXT, -len(sound) % CHUNK))
    chunks = pad(sound.unfold(0, CONTEXT + CHUNK, CHUNK), (0, CONTEXT), "reflect").unsqueeze(1)
    x = conv1d(chunks, rest["stft_conv.weight"], stride=128)
    x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
    for name, stride in STRIDES.items():
        places = pad(x, (1, 1)).unfold(2, 3, stride).permute(0, 2, 1, 3)  # (chunks, times, channels, 3)
        y = linear(name, places.flatten(0, 1).flatten(1), rest[f"{name}.bias"])
        x = y.unflatten(0, places.shape[:2]).transpose(1, 2).relu()
    h = c = torch.zeros(1, 128)
    found = []
    for step in x.squeeze(2).split(1):
        gates = linear("lstm_ih", step, rest["lstm_cell.bias_ih"]) + linear("lstm_hh", h, rest["lstm_cell.bias_hh"])
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        found.append((h.relu() @ rest["final_conv.weight"][:, :, 0].t() + rest["final_conv.bias"]).sigmoid())
    return torch.cat(found).flatten()


def recordings(folder: Path) -> Iterator[Any]:
    """The files of at least a second that are mono, 16 bit, 16 kHz, or raw of that kind -> (samples,) fp32 of each."""
    import torch

    for path in sorted(folder.rglob("*")):
        if path.stat().st_size < 2 * RATE:
            continue
        if path.suffix == ".raw":
            data = path.read_bytes()
        elif path.suffix == ".wav":
            try:
                with wave.open(str(path)) as file:
                    if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
                        continue
                    data = file.readframes(file.getnframes())
            except (wave.Error, EOFError):
                continue
        else:
            continue
        samples = torch.frombuffer(bytearray(data[: len(data) // 2 * 2]), dtype=torch.int16).float() / 2**15
        yield samples


def gathered(matrices: Mapping[str, Any], rest: Mapping[str, Any], sounds: list[Any]) -> dict[str, Any]:
    """Moments of each matrix's inputs, one full block; a sound at a level is a call."""
    import torch
    from nvfp4_video.measure.moments import Moments

    found = {name: Moments.zeros(w.shape[1], w.shape[1]) for name, w in matrices.items()}
    calls = [level * sound for sound in sounds for level in LEVELS]
    for call, sound in enumerate(calls):
        seen: dict[str, list] = {name: [] for name in matrices}
        run(matrices, rest, sound, lambda name, inputs, seen=seen: seen[name].append(inputs))
        for name, parts in seen.items():
            found[name].add(torch.cat(parts), call)
    return found


def measure(way: Callable, given: tuple, known: Mapping, judged: Mapping, sounds: list[Any]) -> dict[str, float]:
    """A way to pack -> its row."""
    matrices, rest = given
    started, packed = time.perf_counter(), {name: way(weight, known[name]) for name, weight in matrices.items()}
    seconds = time.perf_counter() - started
    off = sum(float((packed[name] - weight).square().sum()) for name, weight in matrices.items())
    size = sum(float(weight.square().sum()) for weight in matrices.values())
    row = {"weight error": (off / size) ** 0.5}
    for what, grams in (
        ("output MSE", {name: found.gram + found.held_out for name, found in judged.items()}),
        ("held out", {name: found.held_out for name, found in known.items()}),
    ):
        parts = [calibration.relative(packed[name] - weight, weight, grams[name]) for name, weight in matrices.items()]
        row[what] = sum(parts) / len(parts)
    pairs = [(run(matrices, rest, sound), run(packed, rest, sound)) for sound in sounds]
    chunks = sum(len(one) for one, _ in pairs)
    row["probability"] = sum(float((one - other).abs().sum()) for one, other in pairs) / chunks
    row["decisions"] = sum(float(((one > 0.5) != (other > 0.5)).sum()) for one, other in pairs) / chunks
    return row | {"seconds": seconds}


def main() -> int:
    """Returns 1 if GPTQ with full matrices is not better than the search on outputs."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="silero_vad_16k.safetensors")
    parser.add_argument("--speech", type=Path, required=True, help="a folder with recordings")
    options = parser.parse_args()
    common.import_pack()
    import torch

    found = common.facts()
    common.print_facts(found)
    given, sounds = load(options.weights), list(recordings(options.speech))
    ours, others = sounds[0::2], sounds[1::2]
    with torch.inference_mode():
        known, judged = gathered(*given, ours), gathered(*given, others)
        speech = torch.cat([run(*given, sound) for sound in others])
        tokens = {name: found.tokens + found.held_tokens for name, found in known.items()}
        print(f"{len(ours)} recordings to calibrate with, {len(others)} to judge by; tokens {tokens}")
        print(f"speech in {float((speech > 0.5).float().mean()):.2f} of the chunks", flush=True)
        rows = []
        for name, way in calibration.ways({}).items():
            rows.append({"way": name} | measure(way, given, known, judged, others))
            common.save("calibration_audio", options.out, {"facts": found, "tokens": tokens, "rows": rows})
    common.print_table(rows, {"way": "", "seconds": ".1f"})
    plain, full = (next(row for row in rows if row["way"] == name) for name in ("search", "GPTQ full"))
    return int(not full["output MSE"] < plain["output MSE"])


if __name__ == "__main__":
    sys.exit(main())
