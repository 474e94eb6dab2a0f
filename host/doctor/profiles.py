# SPDX-License-Identifier: Apache-2.0
"""Which flags ComfyUI is best started with on this machine, each with its reason and where that is known from.

A flag is named only if the host's own command line knows it. "Measured by us" is a figure of benchmarks/ or of this
pack's tests on the GPU named; "reported" is somebody's experience in a thread of ComfyUI's issue tracker, by number,
and was not repeated here. Nothing here was run on a GB10.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from . import cards
from .facts import GIB, Fact, gib
from .machine import CPU

COMMAND = "python main.py"
FOLKLORE = ("--disable-async-offload", "--disable-dynamic-vram")
# What ComfyUI takes as a request to leave DynamicVRAM off, besides the flag for it (comfy/cli_args.py).
SWITCHES_DYNAMIC_OFF = ("--highvram", "--gpu-only", "--novram")
# Flags that force a dtype upon every VAE, the audio VAE too, whose encoder computes its spectrum in FP32.
AUDIO_FLAGS = ("--bf16-vae", "--fp16-vae")
MEASURED = "measured by us"
# An LTX-2.3 DiT of 21.0 B parameters with 1,496 Linears in NVFP4.
WEIGHTS_GB = 17.6
ENCODER_GB = 8.1  # Gemma 3 12B in NVFP4
SYSTEM_NEEDS = 4 * GIB  # what the system, Python and torch take before a model is loaded; ComfyUI pins no more either
# Switches that users ask about and no profile recommends, from the host's own help; newer ones than ComfyUI 0.33's too.
OTHERS = {
    "--disable-comfy-compiler": "switches off the Comfy Compiler and with it ComfyUI's CUDA graphs; a workaround for "
    "the error `aimdo memory compile error`, and for nothing else",
    "--disable-cuda-graphs": "switches off the CUDA graphs of ComfyUI's text decoders and those of this pack",
    "--assert-graph-breaks": "stops a prompt where the Comfy Compiler would record a step anew; for developers",
    "--disable-pinned-memory": "copies offloaded weights from ordinary memory, which is slower; a workaround for the "
    "error `HostBuffer.read_file_slice failed` (threads 14250 and 15255)",
    "--fast-disk": "reads offloaded weights from the disk, not from unpinned memory; for a fast NVMe disk",
    "--disable-fast-disk": "keeps offloaded weights in memory where ComfyUI would judge the disk to be fast enough",
    "--offline": "keeps the browser from the internet, partner nodes included; --disable-api-nodes is its old name",
    "--disable-partner-nodes": "leaves out the paid nodes of partners; the browser keeps its access to the internet",
}
_LARGE, _FULL, _MEDIUM = 40 * GIB, 28 * GIB, 20 * GIB

Flag = tuple[str, str, str]  # flag with its value, why, evidence


@dataclass(frozen=True)
class LaunchProfile:
    """``command`` is the line to copy; ``flags`` are (flag, why, evidence); ``note`` says what no flag can.

    ``others`` are (flag, what it does): known to this host, recommended by nobody here.
    """

    name: str
    command: str
    flags: tuple[Flag, ...]
    note: str
    others: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, object]:
        flags = [dict(zip(("flag", "why", "evidence"), flag, strict=True)) for flag in self.flags]
        others = [{"flag": flag, "what": what} for flag, what in self.others]
        return {"name": self.name, "command": self.command, "flags": flags, "note": self.note, "others": others}


def launch_profile(facts: Mapping[str, Fact]) -> LaunchProfile:
    """Facts of probe() -> the profile of this machine and this host."""
    known = _value(facts, "known_flags") or frozenset()
    if not cards.is_nvidia(partial(_value, facts)):
        return _foreign(cards.maker_of(partial(_value, facts)), known, _started(facts))
    name, own, remarks = _machine(facts)
    flags = tuple(flag for flag in (*_crash_flags(facts), *own) if flag[0].split()[0] in known)
    notes = [*remarks, *_crash_notes(facts, flags), *_started_with(facts, flags)]
    if not known:
        notes.append("This process has no ComfyUI, so no flag could be checked against its command line.")
    command = " ".join((COMMAND, *(flag[0] for flag in flags)))
    return LaunchProfile(name, command, flags, " ".join(notes), _others(known))


def _foreign(maker: str, known: Collection[str], started: Collection[str]) -> LaunchProfile:
    """The profile of a machine whose GPU is not NVIDIA's, of which nothing below is known to be true."""
    name = "no GPU" if maker == CPU else f"{maker} GPU"
    return LaunchProfile(name, COMMAND, (), " ".join(cards.advice(maker, known, started)), _others(known))


def _others(known: Collection[str]) -> tuple[tuple[str, str], ...]:
    return tuple((flag, what) for flag, what in OTHERS.items() if flag in known)


def _machine(facts: Mapping[str, Fact]) -> tuple[str, list[Flag], list[str]]:
    """-> name, flags and remarks of the hardware."""
    memory = _value(facts, "gpu_memory")
    if memory is None:
        return "no NVIDIA GPU found", [], ["No flag is recommended without one."]
    if _value(facts, "unified_memory"):
        return _unified(memory, _value(facts, "gpu_name") or "")
    fits = f"LTX-2.3 in NVFP4 weighs {WEIGHTS_GB} GB ({MEASURED})"
    if memory >= _LARGE:
        ran = f"No flag is needed: {fits}; this pack's figures on an H200 were taken with ComfyUI's defaults."
        return "40 GB and more", [], [ran, *_wsl(facts)]
    if memory >= _FULL:
        stays = f"No flag is needed for the weights: {fits} and stays on the GPU as a whole."
        return "32 GB", list(_two_stages(facts)), [stays, *_memory(facts, memory), *_wsl(facts)]
    if memory >= _MEDIUM:
        tight = f"{fits}, which leaves little for the video itself; DynamicVRAM moves weights out as needed."
        return "24 GB", list(_headroom(facts, "1")), [tight, *_small(facts, memory)]
    streams = f"{fits}: part of it stays in system memory and is copied in every step, which DynamicVRAM overlaps."
    return "less than 20 GB", list(_headroom(facts, "0.5")), [streams, *_small(facts, memory)]


def _unified(memory: int, gpu: str) -> tuple[str, list[Flag], list[str]]:
    reserve = 16 if memory >= 100 * GIB else max(2, round(memory / GIB / 8))
    scaled = "" if memory >= 100 * GIB else ", scaled from 16 of 121 GiB to this machine"
    flags: list[Flag] = [
        (
            f"--reserve-vram {reserve}",
            "GPU and system share one memory: without a reserve a large load ends in SIGABRT or NV_ERR_NO_MEMORY "
            "instead of an out-of-memory error",
            f"reported, thread 15285 (GB10, ComfyUI 0.33.1){scaled}",
        )
    ]
    if "Orin" in gpu:
        why = "on this system on a chip ComfyUI does not start, or stops while it loads a model, with DynamicVRAM"
        flags.append(("--disable-dynamic-vram", why, "reported, thread 15285 (Jetson AGX Orin, 32 GB)"))
    remarks = [
        "A loaded file stays in the page cache beside its weights, in the same memory (reported, threads 10896 and "
        "13609), and CUDA counts that as used: the `doctor` command with --release FILE drops it and says how much "
        "that was.",
        "--highvram and --gpu-only switch DynamicVRAM off and gain nothing here: there is no second memory to keep "
        "weights out of. Which flags suit a DGX Spark is an open question among its users (thread 15852).",
    ]
    return "unified memory", flags, remarks


def _headroom(facts: Mapping[str, Fact], gigabytes: str) -> Iterator[Flag]:
    if not _has_no_dynamic_vram(facts):
        why = "keeps room for the desktop and the browser, into which DynamicVRAM else grows; not needed without them"
        yield f"--vram-headroom {gigabytes}", why, "reported, thread 14396 (RTX 4090 and smaller cards)"


def _two_stages(facts: Mapping[str, Fact]) -> Iterator[Flag]:
    if _has_no_dynamic_vram(facts):
        why = "without DynamicVRAM the second, larger stage of a two-stage LTX-2 workflow finds too little memory left"
        yield "--reserve-vram 8", why, "reported, thread 11726 (32 GB card)"


def _small(facts: Mapping[str, Fact], memory: int) -> Iterator[str]:
    """Remarks for a card that keeps the weights in part only."""
    yield from _no_dynamic(facts)
    yield from _memory(facts, memory)
    yield from _wsl(facts)


def _memory(facts: Mapping[str, Fact], memory: int) -> Iterator[str]:
    """For a machine on which model and text encoder fit into no memory, ``memory`` bytes of it on the GPU."""
    system = _value(facts, "memory_total")
    if system is None or memory + system - SYSTEM_NEEDS >= (WEIGHTS_GB + ENCODER_GB) * 1e9:
        return
    yield (
        f"With its text encoder, {ENCODER_GB} GB in NVFP4 ({MEASURED}), that is more than the GPU ({gib(memory)}) and "
        f"the system's memory ({gib(system)}) hold together: what does not fit is read from the file again, in every "
        "prompt or in every step. Keep the files on the fastest disk, close other programs, and take the text encoder "
        "in NVFP4."
    )
    if "--fast-disk" in (_value(facts, "known_flags") or ()):
        yield "--fast-disk leaves weights on an NVMe disk rather than fill memory with them (not tried here)."


def _wsl(facts: Mapping[str, Fact]) -> Iterator[str]:
    if "WSL" in str(_value(facts, "platform") or ""):
        yield (
            "Under WSL the system's memory is what .wslconfig grants, half of the machine's by default, and files "
            "under /mnt are read through a network file system: keep the models on Linux's own disk (Microsoft's "
            "documentation of WSL)."
        )


def _no_dynamic(facts: Mapping[str, Fact]) -> Iterator[str]:
    if _has_no_dynamic_vram(facts):
        since = " (WSL has it since 0.33)" if "WSL" in str(_value(facts, "platform") or "") else ""
        yield (
            "DynamicVRAM is off here, and on this card it matters more than any flag: update ComfyUI"
            f"{since} and PyTorch."
        )


def _has_no_dynamic_vram(facts: Mapping[str, Fact]) -> bool:
    """Whether it is off for another reason than a flag, which the recommended line would leave out."""
    return _value(facts, "dynamic_vram") is False and not _started(facts) & {FOLKLORE[1], *SWITCHES_DYNAMIC_OFF}


def _crash_flags(facts: Mapping[str, Fact]) -> Iterator[Flag]:
    """For a host that has the crash of the block prefetch, if nothing but flags keeps that from happening."""
    streams = _value(facts, "async_offload_streams") != 0 or FOLKLORE[0] in _started(facts)
    possible = streams and not _has_no_dynamic_vram(facts) and _value(facts, "gpu_memory") is not None
    if _value(facts, "prefetch_crash") and possible:
        why = "this ComfyUI stops with 'wait_stream' on a model that stays on the GPU; this one flag avoids it"
        yield FOLKLORE[0], why, f"{MEASURED}, H200"


def _crash_notes(facts: Mapping[str, Fact], flags: tuple[Flag, ...]) -> Iterator[str]:
    crash = _value(facts, "prefetch_crash")
    recommended = {flag[0] for flag in flags}
    folklore = [flag for flag in FOLKLORE if flag not in recommended]
    if crash is False:
        are = "are" if len(folklore) > 1 else "is"
        yield (
            f"`{' '.join(folklore)}` {are} not needed: this ComfyUI does not have the crash that this is recommended "
            "against, and it costs speed and memory."
        )
    elif crash and list(_crash_flags(facts)):
        yield (
            "Better than --disable-async-offload: update ComfyUI, whose pull request 13703 fixed the crash, or put the "
            f"node NVFP4LaunchGuard with the policy `cure` behind the loader ({MEASURED}, H200)."
        )
    elif crash:
        yield "This ComfyUI has the 'wait_stream' crash, which cannot happen on this machine: update it all the same."
    else:
        reason = facts["prefetch_crash"].text.removeprefix("unknown: ") if "prefetch_crash" in facts else "not asked"
        yield f"Whether `{' '.join(folklore)}` must be given is not known: {reason}."


def _started_with(facts: Mapping[str, Fact], flags: tuple[Flag, ...]) -> Iterator[str]:
    """What to leave out of the line this host was started with."""
    superfluous = [flag for flag in FOLKLORE if flag in _started(facts) - {flag[0] for flag in flags}]
    if superfluous and _value(facts, "prefetch_crash") is not None:
        yield f"It was started with {' and '.join(superfluous)}: leave that out."
    for flag in SWITCHES_DYNAMIC_OFF:
        if flag in _started(facts):
            yield f"It was started with {flag}, which switches DynamicVRAM off."
    for flag in AUDIO_FLAGS:
        if flag in _started(facts):
            yield (
                f"It was started with {flag}: ComfyUI's audio VAE of LTX-2 then stops where it encodes sound; NVFP4 "
                "VAE Loader keeps that VAE in FP32."
            )
    if "--disable-comfy-compiler" in _started(facts):
        yield (
            "It was started with --disable-comfy-compiler: leave that out, unless prompts stop with `aimdo memory "
            "compile error` without it."
        )


def _started(facts: Mapping[str, Fact]) -> set[str]:
    """The flags, without their values, this host was started with."""
    return {flag.split()[0] for flag in _value(facts, "launch_flags") or []}


def _value(facts: Mapping[str, Fact], fact_id: str):
    fact = facts.get(fact_id)
    return fact.value if fact is not None else None
