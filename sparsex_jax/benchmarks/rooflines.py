"""What chips can do at best, to say how near a measurement comes."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """Ceilings of a chip, from its vendor's data sheet.

    Attributes:
      tflops: dense bfloat16 arithmetic, 1e12 operations a second.
      gigabytes: device memory, 1e9 bytes a second.
      link_gigabytes: that it sends to chips of its slice, or of its host, 1e9 bytes a second.
      network_gigabytes: that it sends to other hosts, likewise, with an adapter of 400 Gbit/s for
        each GPU; None where links reach all.
    """

    tflops: float
    gigabytes: float
    link_gigabytes: float
    network_gigabytes: float | None = 50


# Patterns of JAX's `device_kind`; the first that is found in it counts.
CHIPS = (
    (r"H200", Chip(989.4, 4800, 450)),
    (r"H100 (80GB HBM3|SXM)", Chip(989.4, 3350, 450)),
    (r"A100.*80GB", Chip(312, 2039, 300)),
    (r"A100.*40GB", Chip(312, 1555, 300)),
    (r"TPU v5 ?(lite|e)\b", Chip(197, 820, 200, None)),
)


def find_chip(device_kind: str) -> Chip | None:
    """The ceilings of a kind of device; None where the table does not have it."""
    for pattern, chip in CHIPS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return chip
    return None


def least_seconds(operations: float, moved: float, chip: Chip) -> float:
    """Time of the roofline (doi:10.1145/1498765.1498785).

    Args:
      operations: floating-point operations, a multiplication and an addition counted as two.
      moved: bytes to and from device memory.
      chip: its ceilings.
    """
    return max(operations / (chip.tflops * 1e12), moved / (chip.gigabytes * 1e9))
