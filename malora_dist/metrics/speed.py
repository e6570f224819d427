"""How fast a run is: per device, in tokens and in operations, and how much of what a device can do that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from malora_dist.config import Config
from malora_dist.parallel.device import device_name
from malora_dist.parallel.topology import Topology
from malora_dist.planning.devices import Precision, peak_tflops


@dataclass(frozen=True)
class Speed:
    """Makes the figures.

    Attributes:
        devices: of the run.
        peak_tflops: what one of them can do; 0: not known, then there is no ``mfu``.
    """

    devices: int
    peak_tflops: float = 0.0

    def scalars(self, tokens: int, flops: float, seconds: float) -> dict[str, float]:
        """By tag.

        Args:
            tokens: of all steps of so many seconds, padding left out.
            flops: of the model in these steps, see :mod:`malora_dist.planning.flops`.
        """
        tflops = flops / seconds / self.devices / 1e12
        found = {
            "tokens-per-second": tokens / seconds,
            "tokens-per-second-per-device": tokens / seconds / self.devices,
            "throughput": tflops,
        }
        return found | ({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {})


def speed_of(config: Config, topology: Topology) -> Speed:
    """Of a run; what its devices can do at its precision is as the config says, else as the data sheet says."""
    fp32: Precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    known = peak_tflops(device_name(topology.device), "bf16" if config.bf16 else fp32)
    return Speed(topology.world_size, config.device_peak_tflops or known)
