"""What chips can do at best, to say how near a measurement comes."""

import math
import re
from typing import NamedTuple

from pallas_kernels.ahead_of_time import GPUS_PER_HOST


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


_LINKS = 4  # of a v5e chip, to its neighbours
_TORUS = 16  # chips of a side of a v5e slice whose ends are linked

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


def link_seconds(kind: str, size: int, chips: int, chip: Chip) -> float:
    """Seconds in which each of some chips sends so many bytes to others, at best.

    GPUs send through NVLink within a host, and where there are several all through the network. On
    a slice of TPU v5e, whose sides are equal or 1 to 2, a permutation goes over one link, and an
    all-to-all is as fast as the links that cross the middle of the longer side; all else goes over
    all four links.

    Args:
      kind: of collective, as XLA names it.
      size: bytes.
      chips: that take part.
      chip: their ceilings.
    """
    if chip.network_gigabytes is not None:
        fast = chips <= GPUS_PER_HOST
        return size / (1e9 * (chip.link_gigabytes if fast else chip.network_gigabytes))
    link = 1e9 * chip.link_gigabytes / _LINKS
    if kind == "collective-permute":
        return size / link
    if kind != "all-to-all":
        return size / (_LINKS * link)
    # Half of a row's chips send half of theirs across its middle, where one link is, or two.
    side = 2 ** math.ceil(math.log2(chips) / 2)
    return size * side / 4 / (link * (2 if side >= _TORUS else 1))
