"""How the kernels of the selection are cut."""

import dataclasses
import itertools
from collections.abc import Iterator

from pallas_kernels import hopper
from pallas_kernels.hopper import HALF

GROUP = 8  # neighbouring blocks: as many rows as TMA copies at least into an operand of wgmma
STEP = HALF * GROUP  # blocks
MOST = 64  # blocks that a query selects


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
      stages: tiles of 64 blocks in shared memory at a time, in the search for groups.
      programs: thread blocks at most.
      places: queries whose candidates are in shared memory at a time.
    """

    stages: int = 4
    programs: int = 2 * hopper.MULTIPROCESSORS
    places: int = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static about a call; `count` is 8 or a multiple of 16."""

    batch: int
    tokens: int
    heads: int
    dim: int
    count: int

    @property
    def tiles(self):
        """Of 64 queries."""
        return self.tokens // HALF

    @property
    def items(self):
        """Tiles of one head."""
        return self.batch * self.tiles * self.heads

    @property
    def part(self):
        """Groups of a query that are scored at a time."""
        return min(self.count, 16) if self.count <= 32 else 8  # what registers hold

    def locate(self, item):
        """(batch element, tile, KV head) of an item."""
        tile, h = item // self.heads, item % self.heads
        return tile // self.tiles, tile % self.tiles, h


def grid(dim: int) -> Iterator[Config]:
    """Configs that are worth trying."""
    for stages, share, places in itertools.product((4, 6, 8), (1, 2), (2, 3)):
        yield Config(stages, share * hopper.MULTIPROCESSORS, places)
