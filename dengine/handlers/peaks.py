"""The peak speeds of devices, by name."""

import re

import torch

__all__ = ["PEAKS", "peak_flops_per_s"]

# Dense 16-bit matrix products with float32 accumulation, in 10^12 operations a second, from the vendors' data sheets
# (half of what they give for sparse ones). The first entry whose words are in the device's name counts.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "V100-PCIE": 112.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 6000 Ada": 364.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
    "MI250": 362.1,
}


def peak_flops_per_s(device: torch.device) -> float | None:
    """The peak of `device` in floating-point operations a second; None if it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an RTX A4000 is no A40.
    named = (peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name, re.IGNORECASE))
    return next((1e12 * peak for peak in named), None)
