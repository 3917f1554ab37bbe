"""The branches of attention as one: a gated sum, or one softmax over the keys of all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsex_jax.config import AttentionConfig

Branch = tuple[jax.Array, jax.Array]  # out [B, T, Hq, D], lse f32 [B, T, Hq]


def fuse(
    local: Branch,
    landmarks: Branch | None,
    dynamic: Branch | None,
    landmark_gate: jax.Array | None,
    dynamic_gate: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """The branches as one output: a gated sum, or one softmax merged from their lse."""
    if config.fusion == "softmax":
        return local[0] if dynamic is None else merge_softmax(local, dynamic)[0]
    wide = jnp.promote_types(local[0].dtype, jnp.float32)
    total = local[0].astype(wide)
    for branch, gate in ((landmarks, landmark_gate), (dynamic, dynamic_gate)):
        if branch is not None:
            out = branch[0].astype(wide)
            total += out if gate is None else out * gate.astype(wide)[..., None]
    return total.astype(local[0].dtype)


class SoftmaxSum(NamedTuple):
    """A softmax over keys that come branch by branch, before its division.

    For merging many branches, of blocks or devices, one after the other: an `lse` that is carried
    from merge to merge is rounded in each, and the errors add up (docs/math.md has how much). Here
    only each branch's own is rounded.

    Attributes:
      top: the largest lse so far, f32 [B, T, Hq]; -inf without keys. It has no gradient.
      total: the sum of exp(lse - top), f32 [B, T, Hq].
      out: the sum of exp(lse - top) * out, f32 [B, T, Hq, D].
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array

    @classmethod
    def empty(cls, q: jax.Array) -> "SoftmaxSum":
        """The sum over no keys, for queries [B, T, Hq, D]."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        zeros = jnp.zeros(q.shape[:3], wide)
        return cls(zeros - jnp.inf, zeros, jnp.zeros(q.shape, wide))

    @classmethod
    def of(cls, branch: Branch) -> "SoftmaxSum":
        """The sum of one branch (out [B, T, Hq, D], lse [B, T, Hq])."""
        out, lse = branch
        top = jax.lax.stop_gradient(lse)
        total = jnp.exp(lse - _finite(top))
        return cls(top, total, out.astype(lse.dtype) * total[..., None])

    def add(self, branch: Branch) -> "SoftmaxSum":
        """The sum with a further branch, which must not share keys with the others."""
        other = SoftmaxSum.of(branch)
        top = jnp.maximum(self.top, other.top)
        old, new = (jnp.exp(x.top - _finite(top)) for x in (self, other))
        out = self.out * old[..., None] + other.out * new[..., None]
        return SoftmaxSum(top, self.total * old + other.total * new, out)

    def branch(self, dtype: jnp.dtype) -> Branch:
        """Output of a dtype and lse of the softmax over all keys; 0 and -inf without any."""
        seen = self.total > 0
        total = jnp.where(seen, self.total, 1)
        out = jnp.where(seen[..., None], self.out / total[..., None], 0).astype(dtype)
        return out, jnp.where(seen, self.top + jnp.log(total), -jnp.inf)


def merge_softmax(first: Branch, second: Branch) -> Branch:
    """One softmax over the keys of two branches, which must not share any.

    To merge more than a few, add them to a `SoftmaxSum`. docs/math.md has the numerics.
    """
    return SoftmaxSum.of(first).add(second).branch(first[0].dtype)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(x > -jnp.inf, x, 0)
