# SPDX-License-Identifier: Apache-2.0
"""Facts about the ComfyUI this pack runs in, each with the place it was read from.

Behaviour is asked for, not versions: the faults that the guard knows are tried on the functions that have them
(trials.py). Importing this module imports nothing of ComfyUI and does not touch the GPU. A fact that cannot be had has
the value None and says why; nothing here raises, and no text holds a path.
"""

from __future__ import annotations

from collections.abc import Callable

from . import machine, settings, trials
from .facts import Fact, why

SOFTWARE, GPU, NVFP4, MEMORY, OFFLOADING, CRASHES = "Software", "GPU", "NVFP4", "Memory", "Offloading", "Known crashes"


def probe() -> dict[str, Fact]:
    """Id -> Fact, in the order of a report. Cheap enough for every queued prompt: only the first call imports."""
    return {fact_id: _answer(fact_id, *question) for fact_id, question in _QUESTIONS.items()}


def _answer(fact_id: str, group: str, label: str, source: str, ask: Callable[[], tuple[object, str]]) -> Fact:
    try:
        value, text = ask()
    except Exception as error:  # whatever a host of another age does, a prompt must not fail because of a question
        value, text = None, f"unknown: {why(error)}"
    return Fact(fact_id, group, label, value, text, source)


<<<<<<< HEAD
=======
def why(error: Exception) -> str:
    """An error in a few words, without paths."""
    # The host names a pack's modules by the path of its folder.
    name = re.split(r"[/\\]", str(getattr(error, "name", None) or ""))[-1]
    if isinstance(error, ModuleNotFoundError):
        missing = name in ("comfy", "comfyui_version")
        return "there is no ComfyUI in this process" if missing else f"there is no module {name}"
    if isinstance(error, importlib.metadata.PackageNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) or not text or _PATH.search(text):
        return f"{type(error).__name__} in {name}" if name else type(error).__name__
    return text if isinstance(error, Unknown) else f"{type(error).__name__}: {text[:200]}"


def running() -> bool:
    """Whether this process is a started ComfyUI, whose main.py has decided about its memory management."""
    server = sys.modules.get("server")
    return getattr(getattr(server, "PromptServer", None), "instance", None) is not None


def _module(name: str):
    return importlib.import_module(name)


def _comfy(name: str):
    return _module(f"comfy.{name}")


def _arguments():
    return getattr(_comfy("cli_args"), "args", None)


def _version_of(*packages: str) -> tuple[str, str]:
    """Version of the first of these packages that is installed."""
    for package in packages[:-1]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return (version := importlib.metadata.version(package)), version
    return (version := importlib.metadata.version(packages[-1])), version


def _comfyui_version() -> tuple[str, str]:
    return (version := _module("comfyui_version").__version__), version


def _frontend_version() -> tuple[str, str]:
    arguments = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    chosen = getattr(arguments, "front_end_version", "@latest")
    if getattr(arguments, "front_end_root", None) or not str(chosen).endswith("@latest"):
        raise Unknown("a launch flag chose another front end than the installed package")
    return _version_of("comfyui-frontend-package")


def _torch_version() -> tuple[str, str]:
    return (version := str(_module("torch").__version__)), version


def _cuda_version() -> tuple[int, ...]:
    version = _module("torch").version.cuda
    if not version:
        raise Unknown("this torch is built without CUDA")
    return tuple(int(part) for part in version.split(".")[:2])


def _torch_cuda() -> tuple[tuple[int, ...], str]:
    version = _cuda_version()
    return version, ".".join(map(str, version))


def _platform() -> tuple[str, str]:
    name = f"{platform.system()} {platform.machine()}"
    return name, f"{name}, Python {platform.python_version()}"


def _known_flags() -> tuple[frozenset[str], str]:
    """The options this host's command line knows."""
    actions = _comfy("cli_args").parser._actions
    flags = frozenset(flag for action in actions for flag in action.option_strings if flag.startswith("--"))
    return flags, str(len(flags))


def _launch_flags() -> tuple[list[str], str]:
    """The flags this process was started with; numbers are shown, names, paths and the port are not."""
    if not running():
        raise Unknown(NOT_STARTED)
    actions = _comfy("cli_args").parser._actions
    options = {option: action for action in actions for option in action.option_strings}
    flags = []
    for word in (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")):
        option = word if word in options else next((name for name in options if name.startswith(word)), None)
        if option is None:
            continue
        action = options[option]
        value = getattr(_arguments(), action.dest, None)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and action.dest != "port"
        flags.append(f"{option} {value}" if number else option)
    return flags, " ".join(flags) or "none"


def _device():
    """The GPU on which ComfyUI computes, or would."""
    torch = _module("torch")
    if "comfy" in sys.modules:
        device = _comfy("model_management").get_torch_device()
        if device.type != "cuda":
            raise Unknown(CPU_ONLY if device.type == "cpu" else f"ComfyUI computes on {device.type} here")
        return device
    if not torch.cuda.is_available():
        raise Unknown("torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def _properties():
    return _module("torch").cuda.get_device_properties(_device())


def _gpu_name() -> tuple[str, str]:
    return (name := _properties().name), name


def _capability() -> tuple[tuple[int, int], str]:
    found = _properties()
    return (found.major, found.minor), f"{found.major}.{found.minor}"


def _gpu_memory() -> tuple[int, str]:
    total, free = _properties().total_memory, _module("torch").cuda.mem_get_info(_device())[0]
    note = ", page cache counted as used" if _unified_memory()[0] else ""
    return total, f"{gib(total)}, {gib(free)} free{note} (CUDA)"


def _unified_memory() -> tuple[bool, str]:
    found = _properties()
    unified = bool(getattr(found, "is_integrated", 0)) or bool(_UNIFIED_NAME.search(found.name))
    return unified, "yes, GPU and CPU share one memory" if unified else "no"


def _meminfo() -> dict[str, int]:
    """Entries of /proc/meminfo in bytes."""
    if not MEMINFO.exists():
        raise Unknown(f"{platform.system()} has no /proc/meminfo")
    lines = (line.split() for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[2:] == ["kB"]}


def _memory_available() -> tuple[int, str]:
    if not MEMINFO.exists():
        found = _module("psutil").virtual_memory()
        return found.available, f"{gib(found.available)} of {gib(found.total)}"
    found = _meminfo()
    return found["MemAvailable"], f"{gib(found['MemAvailable'])} of {gib(found['MemTotal'])}"


def _page_cache() -> tuple[int, str]:
    cached = _meminfo()["Cached"]
    return cached, f"{gib(cached)}, which the system gives back when programs need it"


def gib(nbytes: float) -> str:
    """Bytes for people, in the binary unit in which GPUs are sold."""
    return f"{nbytes / GIB:.1f} GiB"


def _pinned_memory() -> tuple[bool, str]:
    most = _comfy("model_management").MAX_PINNED_MEMORY
    return most > 0, f"on, up to {gib(most)}" if most > 0 else "off"


def _mmap() -> tuple[bool, str]:
    mapped = not _comfy("utils").DISABLE_MMAP
    return mapped, "on" if mapped else "off, by --disable-mmap"


def _async_offload_streams() -> tuple[int, str]:
    streams = _comfy("model_management").NUM_STREAMS
    if isinstance(getattr(_arguments(), "async_offload", None), bool) and streams == 1:
        streams = 0  # hosts before 0.3.76 call the compute stream their first
    text = f"on, {streams} streams" if streams else "off"
    return streams, text if running() else f"{text} (without launch flags)"


def _dynamic_vram() -> tuple[bool, str]:
    try:
        memory = _comfy("memory_management")
    except ModuleNotFoundError as error:
        if error.name != "comfy.memory_management":
            raise
        return False, "no, this ComfyUI has none"
    allocator = getattr(memory, "aimdo_allocator", None)  # how 0.12 to 0.14 told
    enabled = bool(getattr(memory, "aimdo_enabled", allocator is not None))
    if not enabled and not running():
        raise Unknown(f"{NOT_STARTED}, and its main.py decides")
    return enabled, "on" if enabled else "off"


def _compiler() -> tuple[bool, str]:
    """Whether the host records what a step allocates and maps the same memory again (its Comfy Compiler)."""
    try:
        enabled = getattr(_comfy("model_prefetch"), "malloc_graph_enabled", None)
    except ModuleNotFoundError as error:
        if error.name != "comfy.model_prefetch":
            raise
        enabled = None
    if enabled is None:
        return False, "no, this ComfyUI has none"
    if getattr(_arguments(), "disable_comfy_compiler", False):
        return False, "off, by --disable-comfy-compiler"
    device = _comfy("model_management").get_torch_device()
    if device.type != "cuda":
        return False, f"off, it needs CUDA and ComfyUI computes on {device.type} here"
    if not _dynamic_vram()[0]:
        return False, "off, it needs DynamicVRAM"
    if not enabled(device):
        return False, "off, ComfyUI does not say why"
    text = "on"
    if getattr(_arguments(), "disable_cuda_graphs", False):
        text += ", without CUDA graphs (--disable-cuda-graphs)"
    if getattr(_arguments(), "assert_graph_breaks", False):
        text += ", stops where it would record a step anew (--assert-graph-breaks)"
    return True, text


def _prefetch_crash() -> tuple[bool, str]:
    """A queue whose first block needed no copy, so that there is no stream to wait for. Pops it; nothing else happens.

    Introduced by ComfyUI's pull request 13618, cured by 13703; in no release.
    """
    try:
        prefetch = _comfy("model_prefetch")
    except ModuleNotFoundError as error:
        if error.name != "comfy.model_prefetch":
            raise
        return False, "no, this ComfyUI does not prefetch blocks"
    try:
        prefetch.prefetch_queue_pop([(None, (None, None)), None], _module("torch").device("cpu"), None)
    except AttributeError as error:
        if "wait_stream" not in str(error):
            raise
        return True, "yes: a model that stays on the GPU as a whole can stop with 'wait_stream'"
    return False, "no"


def _ltxav_needs_audio() -> tuple[bool, str]:
    """The rotary embedding of no audio tokens, the shape on which ComfyUI 0.29.0 stops; cured by pull request 15132."""
    try:
        _comfy("ldm.lightricks.av_model")
    except ModuleNotFoundError as error:
        if error.name != "comfy.ldm.lightricks.av_model":
            raise
        return False, "no, this ComfyUI has no LTX-2"
    rotary = getattr(_comfy("ldm.lightricks.model"), "freqs_cis_matrix", None)
    if rotary is None:
        return False, "no"
    torch = _module("torch")
    try:
        rotary(torch.zeros(1, 0, 4), 0, True, 2, torch.float32)
    except RuntimeError:
        return True, "yes: LTX-2 cannot sample without an audio latent"
    return False, "no"


def _registry():
    """comfy-kitchen's registry of backends, after ComfyUI, if there is one, has switched some of them off."""
    kitchen = _module("comfy_kitchen")
    with contextlib.suppress(ImportError):
        _comfy("quant_ops")
    return kitchen.registry


def _kitchen_backends() -> tuple[dict[str, bool | str], str]:
    found = {name: _state_of(name, state) for name, state in sorted(_registry().list_backends().items())}
    return found, ", ".join(f"{name} on" if state is True else f"{name} off ({state})" for name, state in found.items())


def _state_of(name: str, state: Mapping) -> bool | str:
    """An entry of kitchen's list -> True, or why it is off."""
    if not state["available"]:
        reason = str(state.get("unavailable_reason") or "not available")
        return "its library cannot be loaded" if _PATH.search(reason) else reason
    if not state["disabled"]:
        return True
    version = _module("torch").version.cuda
    if name == "cuda":
        return f"ComfyUI wants a torch for CUDA 13.0 or newer, this one is for {version or 'no CUDA'}"
    if name == "triton":
        return "ComfyUI wants --enable-triton-backend; this pack's own kernels do not"
    return "switched off"


def _nvfp4_compute() -> tuple[str, str]:
    """How ComfyUI's own Linear computes with an NVFP4 weight."""
    supports = getattr(_comfy("model_management"), "supports_nvfp4_compute", None)
    if supports is None:
        return "none", "not at all, this ComfyUI knows no NVFP4"
    native, registry = supports(_device()), _registry()
    if native:
        backend = registry.get_capable_backend("scaled_mm_nvfp4")
        text = "on FP4 tensor cores (W4A4)"
        return ("fp4", text) if backend == "cuda" else (f"fp4 {backend}", f"{text} by the {backend} backend")
    backend = registry.get_capable_backend("dequantize_nvfp4")
    return f"emulated {backend}", f"no FP4 tensor cores: every weight is dequantised, by the {backend} backend"


def _own_backend() -> tuple[str, str]:
    """How this pack's Linear dequantises."""
    device = _device()  # first: where it is unknown, nothing is imported
    name, reason = importlib.import_module("...kernels.backends", __package__).pick_backend(device)
    return name, f"{name} ({reason})"


>>>>>>> hostmatrix
# Id -> group, label, source, question.
_QUESTIONS: dict[str, tuple[str, str, str, Callable[[], tuple[object, str]]]] = {
    "comfyui_version": (SOFTWARE, "ComfyUI", "comfyui_version.py", machine.comfyui_version),
    "frontend_version": (SOFTWARE, "Front end", "package comfyui-frontend-package", machine.frontend_version),
    "kitchen_version": (
        SOFTWARE, "comfy-kitchen", "package comfy-kitchen", lambda: machine.version_of("comfy-kitchen")
    ),
    "aimdo_version": (SOFTWARE, "comfy-aimdo", "package comfy-aimdo", lambda: machine.version_of("comfy-aimdo")),
    "torch_version": (SOFTWARE, "PyTorch", "torch.__version__", machine.torch_version),
    "torch_cuda": (SOFTWARE, "PyTorch's CUDA", "torch.version.cuda", machine.torch_cuda),
    "triton_version": (SOFTWARE, "Triton", "package triton", lambda: machine.version_of("triton", "triton-windows")),
    "platform": (SOFTWARE, "System", "platform", machine.system),
    "launch_flags": (SOFTWARE, "Launch flags", "sys.argv, comfy.cli_args", settings.launch_flags),
    "known_flags": (SOFTWARE, "Flags it knows", "comfy.cli_args.parser", settings.known_flags),
    "gpu_maker": (GPU, "GPU's maker", "the device's kind, torch.version.hip", machine.gpu_maker),
    "gpu_name": (GPU, "GPU", "torch.cuda.get_device_properties", machine.gpu_name),
    "capability": (GPU, "Compute capability", "torch.cuda.get_device_properties", machine.capability),
    "gpu_memory": (GPU, "GPU memory", "torch.cuda.mem_get_info", machine.gpu_memory),
    "unified_memory": (GPU, "Unified memory", "is_integrated, or the GPU's name", machine.unified_memory),
    "kitchen_backends": (NVFP4, "comfy-kitchen's backends", "comfy_kitchen.list_backends", settings.kitchen_backends),
    "nvfp4_compute": (
        NVFP4, "ComfyUI computes", "supports_nvfp4_compute, comfy_kitchen.registry", settings.nvfp4_compute
    ),
    "own_backend": (NVFP4, "This pack computes", "kernels.backends.pick_backend", settings.own_backend),
    "memory_total": (MEMORY, "System memory", "MemTotal of /proc/meminfo", machine.memory_total),
    "memory_available": (MEMORY, "System memory available", "MemAvailable of /proc/meminfo", machine.memory_available),
    "page_cache": (MEMORY, "Page cache", "Cached of /proc/meminfo", machine.page_cache),
    "pinned_memory": (MEMORY, "Pinned memory", "comfy.model_management.MAX_PINNED_MEMORY", settings.pinned_memory),
    "mmap": (MEMORY, "Files are mapped", "comfy.utils.DISABLE_MMAP", settings.mmap),
    "dynamic_vram": (OFFLOADING, "DynamicVRAM", "comfy.memory_management.aimdo_enabled", settings.dynamic_vram),
    "async_offload_streams": (
        OFFLOADING, "Async offload", "comfy.model_management.NUM_STREAMS", settings.async_offload_streams
    ),
    "compiler": (OFFLOADING, "Comfy Compiler", "comfy.model_prefetch.malloc_graph_enabled", settings.compiler),
    "prefetch_crash": (CRASHES, "Crash in the block prefetch", "tried: prefetch_queue_pop", trials.prefetch_crash),
    "ltxav_needs_audio": (CRASHES, "LTX-2 without audio crashes", "tried: freqs_cis_matrix", trials.ltxav_needs_audio),
    "joint_noise_crash": (
        CRASHES, "Noise for joint audio and video", "tried, if replaced: comfy.sample.prepare_noise",
        trials.joint_noise_crash,
    ),
    "replaced_sampling": (
        CRASHES, "Sampling functions of other packs", "comfy.sample, comfy.samplers", trials.replaced_sampling
    ),
}  # fmt: skip
