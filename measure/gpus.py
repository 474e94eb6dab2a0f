# SPDX-License-Identifier: Apache-2.0
"""GPUs as the planner sees them: memory, bandwidth, dense tensor rates; the rows are in gpu_table.py.

Memory: sheets print GB and mean GiB, of which a card shows nearly all (an H200 139.8 of 141, measured); SHOWN of it is
counted. A GB10 shows 119.7 GiB of its 128 (https://github.com/GuigsEvt/dgx_spark_config/issues/1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ..kernels.errors import PackError
from . import gpu_table as table

GB, TERA, GIB = 1e9, 1e12, 2.0**30
SHOWN = 0.99 * GIB
_GB10 = "https://www.nvidia.com/en-us/products/workstations/dgx-spark/"


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in bytes, bandwidth in bytes a second, rates in FLOP a second; None: not there, or not known.

    ``unified``: CPU and GPU share the memory. ``source``: address of the values; ``note``: what is odd about them.
    ``choice``: that the name it was asked for by is that of other cards, too, and which.
    """

    name: str
    memory: float
    bandwidth: float | None
    bf16: float | None
    fp8: float | None
    fp4: float | None
    capability: tuple[int, int] | None
    source: str
    note: str = ""
    unified: bool = False
    choice: str = ""

    @property
    def known(self) -> bool:
        """Whether times can be predicted, beside sizes."""
        return bool(self.bandwidth and self.bf16)

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def _gpu(
    name: str, gigabytes: float, gigabytes_per_second: float | None, rates: tuple[float | None, ...], capability: str,
    source: str, note: str = "", unified: bool = False,
) -> Gpu:  # fmt: skip
    bf16, fp8, fp4 = (rate and rate * TERA for rate in rates)
    major, minor = capability.split(".")
    memory, bandwidth = gigabytes * SHOWN, gigabytes_per_second and gigabytes_per_second * GB
    return Gpu(name, memory, bandwidth, bf16, fp8, fp4, (int(major), int(minor)), source, note, unified)


def _rows() -> Iterator[Gpu]:
    """The table, the newest cards first."""
    yield _gpu(
        "GB10", 119.7 / 0.99, 273, (125, 250, 500), "12.1", _GB10,
        "NVIDIA states 1,000 TFLOP/s of FP4 with sparsity and nothing else: FP8 and BF16 are a half and a quarter of "
        "the dense rate, as in the RTX PRO 6000. A user measured 97 for FP16: "
        "https://github.com/GuigsEvt/dgx_spark_config/issues/1", True,
    )  # fmt: skip
    for family, cards in table.GEFORCE_CARDS.items():
        each, capability, source, note = table.GEFORCE[family]
        for name, memory, bandwidth, count, clock in cards:
            rates = tuple(rate and round(rate * count * clock / 1000, 1) for rate in each)
            yield _gpu(name, memory, bandwidth, rates, capability, source, note)
    for name, memory, bandwidth, rates, capability, source, note in table.OTHERS:
        yield _gpu(name, memory, bandwidth, rates, capability, source, note, name in table.UNIFIED)
    for unified, (source, capability, note, cards) in [(False, one) for one in table.MEMORY_ONLY] + [
        (True, table.UNIFIED_ONLY)
    ]:
        for name, memory in cards.items():
            yield _gpu(name, memory, None, (None, None, None), capability, source, note, unified)


GPUS = {gpu.name: gpu for gpu in _rows()}
DETECTED = "detected"
EXAMPLES = ("GB10", "RTX 5090", "RTX 4070 Ti SUPER", "RTX 3060 12 GB", "RTX 4090 Laptop", "H100 80 GB")
_NOISE = re.compile(
    r"nvidia|geforce|tesla|workstation edition|edition|generation|with max-q design|sxm\d?|hbm\d?e?|[^a-z0-9]",
    re.IGNORECASE,
)
_SIZE = re.compile(r" \d+ GB$")
_FORM = re.compile(r" (\d+ GB|PCIe|NVL)")
_MOST_NEAR = 8  # names that an error about an unknown one lists


class NoGpuError(PackError):
    """There is no GPU to plan for: which to name, or what to state."""


def find_gpu(name: str, memory: float | None = None) -> Gpu | None:
    """A name as a person or a driver writes it ("NVIDIA GeForce RTX 5090", "5090", "gb10") -> row of the table.

    A card that was sold in several sizes is the one whose size is nearest to ``memory`` bytes, the smallest without.
    """
    wanted = _plain(name)
    if wanted in table.DRIVER_NAMES:
        return GPUS[table.DRIVER_NAMES[wanted]]
    spelled = {_plain(known): gpu for known, gpu in GPUS.items()}
    if found := spelled.get(wanted) or spelled.get(f"rtx{wanted}") or spelled.get(f"gtx{wanted}"):
        return found
    stems = [(_plain(_SIZE.sub("", known)), gpu) for known, gpu in GPUS.items() if _SIZE.search(known)]
    sizes = [gpu for stem, gpu in stems if wanted in (stem, stem.removeprefix("rtx"))]
    return min(sizes, key=lambda gpu: abs(gpu.memory - (memory or 0.0)), default=None)


def _named_alike(name: str) -> list[Gpu]:
    """The cards that a name without memory or form of the board means: more than one for "RTX 3060" or "H100"."""
    wanted = _plain(name)
    if any(wanted in (_plain(known), _plain(known).removeprefix("rtx")) for known in GPUS):
        return []
    stems = ((_plain(_FORM.sub("", known)), gpu) for known, gpu in GPUS.items())
    return [gpu for stem, gpu in stems if wanted in (stem, stem.removeprefix("rtx"))]


def _choice(name: str, gpu: Gpu) -> str:
    """What to say of a card that was picked among several of the same name; empty for the only one."""
    alike = _named_alike(name)
    if len(alike) < 2:
        return ""
    sold = (one.name if _SIZE.search(one.name) else f"{one.name} ({one.memory / SHOWN:.0f} GB)" for one in alike)
    return (
        f"{name} is the name of {', '.join(sold)}: these are the numbers of {gpu.name}. Name the one that you mean, or "
        "set `memory_gib`"
    )


def _near(name: str) -> list[str]:
    """Names of the table that contain the number of one that is in none."""
    wanted = _plain(name).removeprefix("rtx")
    return [known for known in GPUS if len(wanted) > 2 and wanted in _plain(known)][:_MOST_NEAR]


def _plain(name: str) -> str:
    return _NOISE.sub("", re.sub("laptop gpu", "laptop", name, flags=re.IGNORECASE)).lower()


def pick_gpu(
    name: str = DETECTED, *, memory: float | None = None, bandwidth: float | None = None, tflops: float | None = None
) -> Gpu:
    """Name, or "detected" -> Gpu; numbers above 0 replace its values.

    ``memory``: GiB as on the box; ``bandwidth``: GB/s; ``tflops``: dense BF16, to which the other rates are scaled. An
    unlisted GPU needs all three for times; memory alone gives the fit. Of several cards of one name the smallest is
    taken without ``memory``, which its ``choice`` says. NoGpuError says what is missing.
    """
    gpu = detect_gpu() if name == DETECTED else find_gpu(name, memory and memory * SHOWN)
    if gpu and name != DETECTED and not memory:
        gpu = replace(gpu, choice=_choice(name, gpu))
    if gpu is None and not memory:
        what = "no CUDA GPU was found" if name == DETECTED else f"{name!r} is not in the table of GPUs"
        raise NoGpuError(
            f"{what}; choose a card by its name ({', '.join(_near(name) or EXAMPLES)}, {len(GPUS)} in all), or set "
            "`memory_gib` to what its box says, which tells what fits, without times"
        )
    if gpu is None:
        gpu = Gpu("unlisted GPU" if name == DETECTED else name, 0.0, None, None, None, None, None, "")
    given = {"memory": memory and memory * SHOWN, "bandwidth": bandwidth and bandwidth * GB}
    given = {key: value for key, value in given.items() if value}
    if tflops:
        scale = tflops * TERA / gpu.bf16 if gpu.bf16 else 0.0
        given |= {"bf16": tflops * TERA} | {key: scale * rate for key in ("fp8", "fp4") if (rate := getattr(gpu, key))}
    if not all(value > 0 for value in given.values()):
        raise PackError(f"memory, bandwidth and TFLOP/s must be above 0, found {memory}, {bandwidth} and {tflops}")
    if not given:
        return gpu
    return replace(gpu, **given, source=", ".join(filter(None, [gpu.source, "values of the user"])))


def detect_gpu() -> Gpu | None:
    """The first CUDA device -> its row with the memory it really shows; an unlisted one has memory only."""
    import torch

    if not torch.cuda.is_available() or not torch.version.cuda:
        return None
    found = torch.cuda.get_device_properties(0)
    listed = find_gpu(found.name, float(found.total_memory))
    if listed is not None:
        return replace(listed, memory=float(found.total_memory))
    unified = bool(getattr(found, "is_integrated", False))
    memory, capability = float(found.total_memory), (found.major, found.minor)
    return Gpu(found.name, memory, None, None, None, None, capability, "torch", "not in the table", unified)
