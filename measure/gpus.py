# SPDX-License-Identifier: Apache-2.0
"""GPUs as the planner sees them: memory, bandwidth, dense tensor rates. A value without a source is not in the table.

Memory: sheets print GB and mean GiB, of which a card shows nearly all (an H200 139.8 of 141, measured); SHOWN of it is
counted. A GB10 shows 119.7 GiB of its 128 (https://github.com/GuigsEvt/dgx_spark_config/issues/1). Rates are dense,
half of what a sheet gives "with sparsity", with FP32 accumulation, at boost clock.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

from ..kernels.errors import PackError

GB, TERA = 1e9, 1e12
SHOWN = 0.99 * 2**30
_BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_PRO = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
    "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
)
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_COMPARE = "https://www.nvidia.com/en-us/geforce/graphics-cards/compare/"
_GB10 = "https://www.nvidia.com/en-us/products/workstations/dgx-spark/"
_HGX = "https://www.nvidia.com/en-us/data-center/hgx/"


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in bytes, bandwidth in bytes a second, rates in FLOP a second; None: not there, or not known.

    ``unified``: CPU and GPU share the memory. ``source``: address of the values; ``note``: what is odd about them.
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

    @property
    def known(self) -> bool:
        """Whether times can be predicted, beside sizes."""
        return bool(self.bandwidth and self.bf16)

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def _gpu(
    name: str, gigabytes: float, gigabytes_per_second: float, rates: tuple[float | None, ...], capability: str,
    source: str, note: str = "", unified: bool = False,
) -> Gpu:  # fmt: skip
    bf16, fp8, fp4 = (rate and rate * TERA for rate in rates)
    major, minor = capability.split(".")
    memory, bandwidth = gigabytes * SHOWN, gigabytes_per_second * GB
    return Gpu(name, memory, bandwidth, bf16, fp8, fp4, (int(major), int(minor)), source, note, unified)


_HALF_RATE = "GeForce cards run FP8 with FP32 accumulation at half rate; cuBLASLt has been seen above that"
_ROWS = (
    _gpu(
        "GB10", 119.7 / 0.99, 273, (125, 250, 500), "12.1", _GB10,
        "NVIDIA states 1,000 TFLOP/s of FP4 with sparsity and nothing else: FP8 and BF16 are a half and a quarter of "
        "the dense rate, as in the RTX PRO 6000. A user measured 97 for FP16: "
        "https://github.com/GuigsEvt/dgx_spark_config/issues/1", True,
    ),
    _gpu("RTX 5090", 32, 1792, (209.5, 419, 1676), "12.0", _BLACKWELL, _HALF_RATE),
    _gpu("RTX 5080", 16, 960, (112.6, 225.1, 900.4), "12.0", _BLACKWELL, _HALF_RATE),
    _gpu("RTX 5070 Ti", 16, 896, (87.9, 175.8, 703.1), "12.0", _BLACKWELL, _HALF_RATE),
    _gpu("RTX PRO 6000 Blackwell", 96, 1792, (503.8, 1007.6, 2015.2), "12.0", _PRO, "Workstation Edition"),
    _gpu("RTX 4090", 24, 1008, (165.2, 330.3, None), "8.9", _ADA),
    _gpu(
        "RTX 4070 Ti SUPER", 16, 672, (88.2, 176.4, None), "8.9", _COMPARE,
        f"rates from 66 SMs at 2.61 GHz by the RTX 4090's rate a clock ({_ADA})",
    ),
    _gpu("RTX 3090", 24, 936, (71, None, None), "8.6", _GA102),
    _gpu("RTX A6000", 48, 768, (154.8, None, None), "8.6", _GA102),
    _gpu("L40S", 48, 864, (362, 733, None), "8.9", "https://www.nvidia.com/en-us/data-center/l40s/"),
    _gpu("A100 80 GB", 80, 2039, (312, None, None), "8.0", "https://www.nvidia.com/en-us/data-center/a100/", "SXM"),
    _gpu("H100 80 GB", 80, 3350, (989.4, 1978.9, None), "9.0", "https://www.nvidia.com/en-us/data-center/h100/", "SXM"),
    _gpu("H200", 141, 4800, (989.5, 1979, None), "9.0", "https://www.nvidia.com/en-us/data-center/h200/", "SXM"),
    _gpu("B200", 180, 8000, (2250, 4500, 9000), "10.0", _HGX, "an eighth of an HGX B200; FP8 and BF16 halved from it"),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _ROWS}
DETECTED = "detected"
_NOISE = re.compile(r"nvidia|geforce|workstation edition|generation|sxm\d?|hbm\d?e?|80 ?gb|[^a-z0-9]", re.IGNORECASE)


def find_gpu(name: str) -> Gpu | None:
    """A name as a person or a driver writes it ("NVIDIA GeForce RTX 5090", "5090", "gb10") -> row of the table."""
    wanted = _plain(name)
    spelled = {_plain(known): gpu for known, gpu in GPUS.items()}
    short = {plain.removeprefix("rtx"): gpu for plain, gpu in spelled.items()}
    return spelled.get(wanted) or short.get(wanted)


def _plain(name: str) -> str:
    return _NOISE.sub("", name).lower()


def pick_gpu(
    name: str = DETECTED, *, memory: float | None = None, bandwidth: float | None = None, tflops: float | None = None
) -> Gpu:
    """Name, or "detected" -> Gpu; numbers above 0 replace its values.

    ``memory``: GB as on the box; ``bandwidth``: GB/s; ``tflops``: dense BF16, to which the other rates are scaled. An
    unlisted GPU needs all three for times; memory alone gives the fit. PackError says what is missing.
    """
    gpu = detect_gpu() if name == DETECTED else find_gpu(name)
    if gpu is None and not memory:
        what = "no CUDA GPU was found" if name == DETECTED else f"{name!r} is not in the table of GPUs"
        raise PackError(
            f"{what}; name one of {', '.join(GPUS)}, or state the memory in GB (for times also the bandwidth in GB/s "
            "and the dense BF16 TFLOP/s): --memory --bandwidth --tflops"
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
    listed = find_gpu(found.name)
    if listed is not None:
        return replace(listed, memory=float(found.total_memory))
    unified = bool(getattr(found, "is_integrated", False))
    memory, capability = float(found.total_memory), (found.major, found.minor)
    return Gpu(found.name, memory, None, None, None, None, capability, "torch", "not in the table", unified)
