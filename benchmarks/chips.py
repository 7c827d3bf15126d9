"""What the chips can do at most, and the least time that a step can take on them.

Per chip, from Google's documentation: https://cloud.google.com/tpu/docs/v5e and
https://cloud.google.com/tpu/docs/v5p, read in November 2026. The documentation counts both directions
of the links; data go one way.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Peaks of one chip.

    Attributes:
      flops: floating-point operations per second in bfloat16.
      memory_bandwidth: bytes per second from and to the high-bandwidth memory.
      link_bandwidth: bytes per second that all links together send.
      topologies: JAX's name of the slice for every number of chips.
    """

    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    topologies: dict[int, str]


CHIPS = {
    "v5e": Chip(
        197e12,
        819e9,
        400e9 / 2,
        {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"},
    ),
    "v5p": Chip(
        459e12,
        2765e9,
        1200e9 / 2,
        {4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8"},
    ),
}


def roofline(chip: Chip, flops: float, accessed: float, sent: float) -> tuple[float, str]:
    """Seconds that the slowest of compute, memory and links needs at its peak, and which it is.

    This is a lower bound: nothing reaches its peak, and not everything overlaps.
    """
    seconds = {
        "compute": flops / chip.flops,
        "memory": accessed / chip.memory_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    return seconds[slowest], slowest
