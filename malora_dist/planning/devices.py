"""What devices can do at most, from their makers' data sheets."""

from __future__ import annotations

from typing import Literal, NamedTuple

Precision = Literal["bf16", "tf32", "fp32"]


class Peak(NamedTuple):
    """Dense TFLOP/s with accumulation in float32 (data sheets often give twice as much, for sparse matrices)."""

    bf16: float
    tf32: float
    fp32: float


#: {words of the name that CUDA calls a device by: its peak}; the first that fits counts, so the special come first.
#: Sources: NVIDIA's data sheet of each device, for the RTX cards the white papers of their architectures (GA102, Ada).
PEAKS: dict[str, Peak] = {
    "GB200": Peak(2500, 1250, 80),
    "B200": Peak(2250, 1125, 75),
    "GH200": Peak(989, 494, 67),
    "H200 NVL": Peak(835, 417, 60),
    "H200": Peak(989, 494, 67),
    "H100 NVL": Peak(835, 417, 60),
    "H100 PCIe": Peak(756, 378, 51),
    "H100": Peak(989, 494, 67),
    "A100": Peak(312, 156, 19.5),
    "A40": Peak(149.7, 74.8, 37.4),
    "A30": Peak(165, 82, 10.3),
    "A10": Peak(125, 62.5, 31.2),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L4": Peak(121, 60, 30.3),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
}
#: Words of devices that are less than their name says.
_PARTS = frozenset({"MIG", "Laptop"})


def peak_tflops(device: str, precision: Precision) -> float:
    """The peak of a device in dense TFLOP/s; 0 if it is not known.

    Args:
        device: its name, as CUDA has it, for example ``NVIDIA H100 80GB HBM3``.
    """
    words = set(device.replace("-", " ").split())
    if words & _PARTS:
        return 0.0
    for name, peak in PEAKS.items():
        if words >= set(name.split()):
            return float(getattr(peak, precision))
    return 0.0
