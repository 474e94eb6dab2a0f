# SPDX-License-Identifier: Apache-2.0
"""The table of GPUs: NVIDIA's cards since Turing that have memory enough to ask about, from NVIDIA's public figures.

Memory is what the box says (GB there means GiB), bandwidth in GB/s. Rates are dense TFLOP/s of BF16, FP8 and FP4 with
FP32 accumulation at boost clock, half of what a sheet gives "with sparsity". Where no rate is written NVIDIA publishes
none that holds for every such card (laptops run at the clock their maker chose), or the card cannot (Turing has no
BF16): these rows tell what fits, and no times.

GeForce rates are those of the architecture for each SM and clock, times SMs and boost clock of NVIDIA's comparison
page; this gives the whitepapers' own values where they state them (RTX 5090 209.5, 5080 112.6, 5070 Ti 87.9, 4090
165.2, 3090 71). RTX Ada and Ampere workstation cards do four times their published FP32 rate (RTX A6000: 38.7 and
154.8), RTX PRO Blackwell ones a quarter of their published FP4 rate (RTX PRO 6000: 2,015 and 503.8).

The rows were first written from memory, and on 2026-11-30 each was compared with second-hand copies of its sources:
memory, bandwidth, SMs, boost clock and capability with TechPowerUp's database (December 2025) or, for what that lacks,
NVIDIA's list of MIG devices and owners' reports; rates with quotations of NVIDIA's whitepapers, data sheets and product
pages. NVIDIA's own documents, whose addresses the rows give, were not opened. No quotation was found of the rates of
RTX A5500, 4500 Ada, PRO 4000, PRO 2000, A30 and A2: they agree with SMs times clock. Where TechPowerUp differs from a
quoted NVIDIA figure, NVIDIA's stands: bandwidths of Hopper, B200, B300, RTX 2000 Ada and RTX PRO 6000 Server, clocks of
RTX PRO 4000 SFF, 4500, 5000 and 6000 Server. A value for which nothing was found is not in the table.
"""

from __future__ import annotations

COMPARE = "https://www.nvidia.com/en-us/geforce/graphics-cards/compare/"
LAPTOPS = "https://www.nvidia.com/en-us/geforce/laptops/compare/"
BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
PRO = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
    "pdf/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1_1.pdf"
)
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
TURING = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/"
    "NVIDIA-Turing-Architecture-Whitepaper.pdf"
)
WORKSTATION = "https://www.nvidia.com/en-us/products/workstations/"
DESKTOP_PRO = f"{WORKSTATION}professional-desktop-gpus/"
DATA_CENTER = "https://www.nvidia.com/en-us/data-center/"
JETSON = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/"
_HALF_RATE = "GeForce cards run FP8 with FP32 accumulation at half rate; cuBLASLt has been seen above that"
NO_BF16 = "it has no BF16 tensor cores, and ComfyUI computes LTX in FP32 there"
LAPTOP_NOTE = "laptops run at clocks of their own"
_FROM_FP4 = "FP8 and BF16 are a half and a quarter of its stated FP4 rate, as in the RTX PRO 6000"

# FLOP for each SM and clock: BF16, FP8, FP4. Capability, source, note.
GEFORCE = {
    "Blackwell": ((512, 1024, 4096), "12.0", f"{COMPARE} {BLACKWELL}", _HALF_RATE),
    "Ada": ((512, 1024, None), "8.9", f"{COMPARE} {ADA}", ""),
    "Ampere": ((512, None, None), "8.6", f"{COMPARE} {GA102}", ""),
}
# Name, GB, GB/s, SMs, boost GHz.
GEFORCE_CARDS = {
    "Blackwell": (
        ("RTX 5090", 32, 1792, 170, 2.407),
        ("RTX 5080", 16, 960, 84, 2.617),
        ("RTX 5070 Ti", 16, 896, 70, 2.452),
        ("RTX 5070", 12, 672, 48, 2.512),
        ("RTX 5060 Ti 16 GB", 16, 448, 36, 2.572),
        ("RTX 5060 Ti 8 GB", 8, 448, 36, 2.572),
        ("RTX 5060", 8, 448, 30, 2.497),
        ("RTX 5050", 8, 320, 20, 2.572),
    ),
    "Ada": (
        ("RTX 4090", 24, 1008, 128, 2.52),
        ("RTX 4090 D", 24, 1008, 114, 2.52),
        ("RTX 4080 SUPER", 16, 736, 80, 2.55),
        ("RTX 4080", 16, 717, 76, 2.505),
        ("RTX 4070 Ti SUPER", 16, 672, 66, 2.61),
        ("RTX 4070 Ti", 12, 504, 60, 2.61),
        ("RTX 4070 SUPER", 12, 504, 56, 2.475),
        ("RTX 4070", 12, 504, 46, 2.475),
        ("RTX 4060 Ti 16 GB", 16, 288, 34, 2.535),
        ("RTX 4060 Ti 8 GB", 8, 288, 34, 2.535),
        ("RTX 4060", 8, 272, 24, 2.46),
    ),
    "Ampere": (
        ("RTX 3090 Ti", 24, 1008, 84, 1.86),
        ("RTX 3090", 24, 936, 82, 1.695),
        ("RTX 3080 Ti", 12, 912, 80, 1.665),
        ("RTX 3080 12 GB", 12, 912, 70, 1.71),
        ("RTX 3080 10 GB", 10, 760, 68, 1.71),
        ("RTX 3070 Ti", 8, 608, 48, 1.77),
        ("RTX 3070", 8, 448, 46, 1.725),
        ("RTX 3060 Ti", 8, 448, 38, 1.665),
        ("RTX 3060 12 GB", 12, 360, 28, 1.777),
        ("RTX 3060 8 GB", 8, 240, 28, 1.777),
        ("RTX 3050 8 GB", 8, 224, 20, 1.777),
        ("RTX 3050 6 GB", 6, 168, 18, 1.47),
    ),
}
# Name, GB, GB/s, rates, capability, source, note.
OTHERS = (
    ("RTX PRO 6000 Blackwell", 96, 1792, (503.8, 1007.6, 2015.2), "12.0", PRO, "Workstation Edition"),
    ("RTX PRO 6000 Blackwell Max-Q", 96, 1792, (438.9, 877.8, 1755.5), "12.0", PRO, ""),
    ("RTX PRO 6000 Blackwell Server", 96, 1597, (468, 936, 1872), "12.0",
     f"{DATA_CENTER}rtx-pro-6000-blackwell-server-edition/",
     "BF16, FP8 and FP4 are 2, 4 and 8 times its stated TF32 rate of 234; theirs are stated in whole PFLOP/s"),
    ("RTX PRO 5000 Blackwell 72 GB", 72, 1344, (258, 516, 1032), "12.0", f"{DESKTOP_PRO}rtx-pro-5000/", _FROM_FP4),
    ("RTX PRO 5000 Blackwell 48 GB", 48, 1344, (258, 516, 1032), "12.0", f"{DESKTOP_PRO}rtx-pro-5000/", _FROM_FP4),
    ("RTX PRO 4500 Blackwell", 32, 896, (210.9, 421.8, 843.5), "12.0", f"{DESKTOP_PRO}rtx-pro-4500/", _FROM_FP4),
    ("RTX PRO 4000 Blackwell", 24, 672, (147.3, 294.5, 589), "12.0", f"{DESKTOP_PRO}rtx-pro-4000/", _FROM_FP4),
    ("RTX PRO 4000 Blackwell SFF", 24, 432, (96.3, 192.5, 385), "12.0", f"{DESKTOP_PRO}rtx-pro-4000-sff/", _FROM_FP4),
    ("RTX PRO 2000 Blackwell", 16, 288, (68.1, 136.3, 272.5), "12.0", f"{DESKTOP_PRO}rtx-pro-2000/", _FROM_FP4),
    ("RTX 6000 Ada", 48, 960, (364.2, 728.5, None), "8.9", f"{WORKSTATION}rtx-6000/", ""),
    ("RTX 5000 Ada", 32, 576, (261.1, 522.2, None), "8.9", f"{WORKSTATION}rtx-5000/", ""),
    ("RTX 4500 Ada", 24, 432, (158.5, 317, None), "8.9", f"{WORKSTATION}rtx-4500/", ""),
    ("RTX 4000 Ada", 20, 360, (106.9, 213.8, None), "8.9", f"{WORKSTATION}rtx-4000/",
     "4 and 8 times its FP32 rate; its sheet prints 327.6 TFLOP/s of sparse FP8, where that makes 427.6"),
    ("RTX 4000 SFF Ada", 20, 280, (76.7, 153.4, None), "8.9", f"{WORKSTATION}rtx-4000-sff/", ""),
    ("RTX 2000 Ada", 16, 224, (48, 96, None), "8.9", f"{WORKSTATION}rtx-2000/", ""),
    ("RTX A6000", 48, 768, (154.8, None, None), "8.6", GA102, ""),
    ("RTX A5500", 24, 768, (136.4, None, None), "8.6", f"{WORKSTATION}rtx-a5500/", ""),
    ("RTX A5000", 24, 768, (111.1, None, None), "8.6", f"{WORKSTATION}rtx-a5000/", ""),
    ("RTX A4500", 20, 640, (94.6, None, None), "8.6", f"{WORKSTATION}rtx-a4500/", ""),
    ("RTX A4000", 16, 448, (76.7, None, None), "8.6", f"{WORKSTATION}rtx-a4000/", ""),
    ("RTX A2000 12 GB", 12, 288, (32, None, None), "8.6", f"{WORKSTATION}rtx-a2000/", ""),
    ("RTX A2000 6 GB", 6, 288, (32, None, None), "8.6", f"{WORKSTATION}rtx-a2000/", ""),
    ("B300", 270, 7700, (2250, 4500, 13500), "10.3", f"{DATA_CENTER}hgx/",
     "an eighth of an HGX B300, whose sheet rounds FP4 to 14 PFLOP/s for each GPU"),
    ("GB300", 279, 8000, (2500, 5000, 15000), "10.3", f"{DATA_CENTER}gb300-nvl72/", "a 72nd of a GB300 NVL72"),
    ("B200", 180, 7700, (2250, 4500, 9000), "10.0", f"{DATA_CENTER}hgx/", "an eighth of an HGX B200"),
    ("GB200", 186, 8000, (2500, 5000, 10000), "10.0", f"{DATA_CENTER}gb200-nvl72/", "a 72nd of a GB200 NVL72"),
    ("H200", 141, 4800, (989.5, 1979, None), "9.0", f"{DATA_CENTER}h200/", "SXM"),
    ("H200 NVL", 141, 4800, (835.5, 1670.5, None), "9.0", f"{DATA_CENTER}h200/", ""),
    ("GH200 144 GB", 144, 4900, (989.5, 1979, None), "9.0", f"{DATA_CENTER}grace-hopper-superchip/", ""),
    ("GH200 96 GB", 96, 4000, (989.5, 1979, None), "9.0", f"{DATA_CENTER}grace-hopper-superchip/", ""),
    ("H100 80 GB", 80, 3350, (989.4, 1978.9, None), "9.0", f"{DATA_CENTER}h100/", "SXM"),
    ("H100 PCIe", 80, 2000, (756, 1513, None), "9.0", f"{DATA_CENTER}h100/", ""),
    ("H100 NVL", 94, 3900, (835.5, 1670.5, None), "9.0", f"{DATA_CENTER}h100/", ""),
    ("L40S", 48, 864, (362, 733, None), "8.9", f"{DATA_CENTER}l40s/", ""),
    ("L40", 48, 864, (181, 362, None), "8.9", f"{DATA_CENTER}l40/", ""),
    ("L4", 24, 300, (121, 242.5, None), "8.9", f"{DATA_CENTER}l4/", ""),
    ("A100 80 GB", 80, 2039, (312, None, None), "8.0", f"{DATA_CENTER}a100/", "SXM"),
    ("A100 80 GB PCIe", 80, 1935, (312, None, None), "8.0", f"{DATA_CENTER}a100/", ""),
    ("A100 40 GB", 40, 1555, (312, None, None), "8.0", f"{DATA_CENTER}a100/", ""),
    ("A40", 48, 696, (149.7, None, None), "8.6", f"{DATA_CENTER}a40/", ""),
    ("A30", 24, 933, (165, None, None), "8.0", f"{DATA_CENTER}products/a30-gpu/", ""),
    ("A10", 24, 600, (125, None, None), "8.6", f"{DATA_CENTER}products/a10-gpu/", ""),
    ("A16", 16, 200, (17.9, None, None), "8.6", f"{DATA_CENTER}products/a16-gpu/", "one of the four GPUs of a card"),
    ("A2", 16, 200, (18, None, None), "8.6", f"{DATA_CENTER}products/a2/", ""),
    ("Jetson AGX Thor", 128, 273, (258.8, 517.5, 1035), "11.0", f"{JETSON}jetson-thor/",
     "NVIDIA states 2,070 TFLOP/s of FP4 with sparsity, 1,035 dense, 517 of FP8 dense and of FP16 with sparsity"),
    ("Jetson T4000", 64, 273, (150, 300, 600), "11.0", f"{JETSON}jetson-thor/",
     "NVIDIA states 1,200 TFLOP/s of FP4 with sparsity, 600 dense, 300 of FP8 dense and of FP16 with sparsity"),
)  # fmt: skip
# Name -> GB, by source, capability and the reason why there are no times.
MEMORY_ONLY = (
    (LAPTOPS, "12.0", LAPTOP_NOTE, {
        "RTX 5090 Laptop": 24, "RTX 5080 Laptop": 16, "RTX 5070 Ti Laptop": 12, "RTX 5070 Laptop 12 GB": 12,
        "RTX 5070 Laptop 8 GB": 8, "RTX 5060 Laptop": 8, "RTX 5050 Laptop": 8, "RTX PRO 5000 Blackwell Laptop": 24,
        "RTX PRO 4000 Blackwell Laptop": 16, "RTX PRO 3000 Blackwell Laptop": 12, "RTX PRO 2000 Blackwell Laptop": 8,
        "RTX PRO 1000 Blackwell Laptop": 8, "RTX PRO 500 Blackwell Laptop": 6,
    }),
    (LAPTOPS, "8.9", LAPTOP_NOTE, {
        "RTX 4090 Laptop": 16, "RTX 4080 Laptop": 12, "RTX 4070 Laptop": 8, "RTX 4060 Laptop": 8, "RTX 4050 Laptop": 6,
        "RTX 5000 Ada Laptop": 16, "RTX 4000 Ada Laptop": 12, "RTX 3500 Ada Laptop": 12, "RTX 3000 Ada Laptop": 8,
        "RTX 2000 Ada Laptop": 8,
    }),
    (LAPTOPS, "8.6", LAPTOP_NOTE, {
        "RTX 3080 Ti Laptop": 16, "RTX 3080 Laptop 16 GB": 16, "RTX 3080 Laptop 8 GB": 8, "RTX 3070 Ti Laptop": 8,
        "RTX 3070 Laptop": 8, "RTX 3060 Laptop": 6, "RTX 3050 Ti Laptop": 4, "RTX 3050 Laptop 6 GB": 6,
        "RTX 3050 Laptop 4 GB": 4, "RTX A5500 Laptop": 16, "RTX A5000 Laptop": 16, "RTX A4500 Laptop": 16,
        "RTX A4000 Laptop": 8,
    }),
    (COMPARE, "12.0", "NVIDIA limits its tensor rates by an amount it does not state for each format", {
        "RTX 5090 D": 32, "RTX 5090 D v2": 24,
    }),
    ("https://www.techpowerup.com/gpu-specs/rtx-5880-ada-generation.c4191", "8.9",
     "no NVIDIA figure was found for its bandwidth", {"RTX 5880 Ada": 48}),
    ("https://www.techpowerup.com/gpu-specs/a10g.c3798", "8.6", "NVIDIA publishes no rates for it", {"A10G": 24}),
    ("https://docs.nvidia.com/datacenter/tesla/mig-user-guide/supported-gpus.html", "9.0",
     "NVIDIA publishes no rates for it", {"H20": 96}),
    (TURING, "7.5", NO_BF16, {
        "TITAN RTX": 24, "RTX 2080 Ti": 11, "RTX 2080 SUPER": 8, "RTX 2080": 8, "RTX 2070 SUPER": 8, "RTX 2070": 8,
        "RTX 2060 SUPER": 8, "RTX 2060 12 GB": 12, "RTX 2060 6 GB": 6, "GTX 1660 Ti": 6, "GTX 1660 SUPER": 6,
        "GTX 1660": 6, "GTX 1650 SUPER": 4, "GTX 1650": 4, "Quadro RTX 8000": 48, "Quadro RTX 6000": 24,
        "Quadro RTX 5000": 16, "Quadro RTX 4000": 8, "T4": 16,
    }),
)  # fmt: skip
# Jetson Orin shares its memory with the CPU.
UNIFIED_ONLY = (f"{JETSON}jetson-orin/", "8.7", "its BF16 rate is not public", {"Jetson AGX Orin 64 GB": 64,
                "Jetson AGX Orin 32 GB": 32, "Jetson Orin NX 16 GB": 16})  # fmt: skip
UNIFIED = ("Jetson AGX Thor", "Jetson T4000")
# What drivers call a card that the rows name otherwise, as ``gpus.find_gpu`` reads it.
DRIVER_NAMES = {
    "a100pcie40gb": "A100 40 GB",
    "a10040gbpcie": "A100 40 GB",
    "thor": "Jetson AGX Thor",
    "gh200480gb": "GH200 96 GB",
    "gh200144ghbm3e": "GH200 144 GB",
    "dgxspark": "GB10",
    "rtxpro500072gbblackwell": "RTX PRO 5000 Blackwell 72 GB",
}
