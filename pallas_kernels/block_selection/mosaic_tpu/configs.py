"""How the kernel is cut, and what it takes of VMEM."""

import dataclasses
import math

import jax.numpy as jnp

GROUP = 8  # blocks of a group, groups of a supergroup, supergroups of a step: sublanes
STEP = GROUP**3  # blocks
LANES = 128
# Bytes of VMEM for what the compiler adds: the product of a step, and registers that it spills.
_COMPILER_VMEM = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is cut.

    Attributes:
      queries: of a tile, at most; a multiple of 128.
      blocks: of a chunk, at most, whose scores are in VMEM; a multiple of 512.
    """

    queries: int = 512
    blocks: int = 8192

    def __post_init__(self):
        for name, multiple in (("queries", LANES), ("blocks", STEP)):
            value = getattr(self, name)
            if value < multiple or value % multiple:
                raise ValueError(f"{name}={value} must be a multiple of {multiple}: use {multiple}")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call: `queries` of a tile, `blocks` of a chunk, features of width `dim`, K."""

    queries: int
    blocks: int
    dim: int
    count: int

    @property
    def slots(self) -> int:
        """K in whole registers of 8 sublanes."""
        return -(-self.count // GROUP) * GROUP

    @property
    def candidates(self) -> int:
        """Most rows of which the best are taken: supergroups, or members of K groups."""
        return max(self.blocks // GROUP**2, GROUP * self.slots)

    def buffers(self) -> dict:
        """Shape and dtype of each buffer that the kernel declares in VMEM."""
        f32, queries = jnp.float32, self.queries
        # Descents look at 8 x 64 rows at a time.
        group_rows = -(-self.blocks // (GROUP * STEP)) * STEP
        return {
            "features": ((2, STEP, self.dim), jnp.bfloat16),
            "scores": ((self.blocks, queries), f32),
            "group_maxima": ((group_rows, queries), f32),
            "candidate_score": ((self.candidates, queries), f32),
            "candidate_id": ((self.slots, queries), f32),
            "chosen": ((self.slots, queries), f32),
            "best_score": ((self.slots, queries), f32),
            "best_id": ((self.slots, queries), f32),
            "earlier_score": ((self.slots, queries), f32),
            "earlier_id": ((self.slots, queries), f32),
        }

    def vmem_bytes(self) -> int:
        """What the kernel may take: its buffers, two of each block of its operands and results.

        And what the compiler adds, which refuses to compile a kernel that takes more.
        """
        blocks = [
            ((self.dim, self.queries), jnp.bfloat16),
            ((GROUP, self.queries), jnp.int32),
            ((self.slots, self.queries), jnp.int32),
            ((self.slots, self.queries), jnp.float32),
        ]

        def padded(shape, dtype):
            *rows, lanes = shape
            return math.prod(rows) * (-(-lanes // LANES) * LANES) * jnp.dtype(dtype).itemsize

        held = sum(padded(*each) for each in self.buffers().values())
        return held + 2 * sum(padded(*each) for each in blocks) + _COMPILER_VMEM
