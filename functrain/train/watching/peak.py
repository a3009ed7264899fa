"""What a device can do in a second, for the model-FLOPs utilisation of a record."""

from __future__ import annotations

import torch

# dense products of bfloat16 or float16 that add up in float32, from the makers' data sheets, in 10 ** 12 a second; the
# first whose words are all in the device's name counts
_PEAKS = {
    "B200": 2250.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "MI325X": 1307.0, "MI300X": 1307.0,
}  # fmt: skip


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Return the floating-point operations a second of a GPU's dense products in bfloat16 or float16, of its data
    sheet, or None for a device that is not known, a CPU, and another dtype.

    >>> ft.train.watching.peak_flops("cpu") is None
    True
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return of_name(torch.cuda.get_device_name(device))


def of_name(name: str) -> float | None:
    """Return the peak of the GPU of that name.

    >>> of_name("NVIDIA A100-SXM4-40GB"), of_name("NVIDIA H100 PCIe"), of_name("a GPU of next year")
    (312000000000000.0, 756000000000000.0, None)
    """
    words = set(name.replace("-", " ").split())
    return next((peak * 1e12 for known, peak in _PEAKS.items() if words.issuperset(known.split())), None)
