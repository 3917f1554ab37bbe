"""Small layers; parameters are f32 and carry logical axis names for sharding.

Within `jax.shard_map` a layer holds a device's part of them (`sparsex_jax.parallel.rules`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sparsex_jax.parallel.rules import enter_split, leave_split, whole
from sparsex_jax.scoring import rms_normalize
from sparsex_jax.token_chunks import even_size, map_chunks

TOGETHER = 2**15  # tokens whose hidden values SwiGLU has at a time, at most
_ROWS = 128  # of a product, which takes no longer for fewer


class Linear(nnx.Module):
    """x @ kernel, without bias, in the given type.

    Args:
      shape: (inputs, outputs).
      axes: logical names of the two axes.
      dtype: type of the product.
      scale: standard deviation of the initial kernel times sqrt(inputs); 0 starts from zeros.
      rngs: random streams; "params" is used.
    """

    def __init__(self, shape, axes, dtype, *, scale: float = 1.0, rngs: nnx.Rngs):
        init = nnx.initializers.normal(scale * shape[0] ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32), axis_names=axes)
        self.axes, self.dtype = axes, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] to [..., outputs], those of the device."""
        return self.multiply(x, self.whole_kernel())

    def whole_kernel(self) -> jax.Array:
        """The kernel as it is computed with."""
        return whole(self.kernel, self.dtype)

    def multiply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """As `__call__`, of what `whole_kernel` gave."""
        return leave_split(x.astype(self.dtype) @ kernel, self.axes)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32), axis_names=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        return rms_normalize(x) * whole(self.scale, x.dtype)


class CausalConvolution(nnx.Module):
    """x plus a depthwise causal convolution of it; starts near the identity.

    Args:
      dim: channels.
      width: taps, the token itself included.
      rngs: random streams; "params" is used.
    """

    def __init__(self, dim: int, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.1)(rngs.params(), (width, dim), jnp.float32)
        self.taps = nnx.Param(init, axis_names=(None, "model"))
        self.width = width

    def __call__(
        self,
        x: jax.Array,
        history: jax.Array | None = None,
        age: jax.Array | None = None,
    ) -> jax.Array:
        """Convolves along the tokens.

        Args:
          x: [B, T, C].
          history: the width - 1 tokens before x, [B, width - 1, C]; None is zeros.
          age: int [B, T], tokens before each in its document, into others of which taps do not
            reach; None for one document.

        Returns:
          [B, T, C].
        """
        tokens, before = x.shape[1], self.width - 1
        if history is None:
            padded = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
        else:
            padded = jnp.concatenate((history, x), axis=1)
        taps = whole(self.taps, x.dtype)
        total = x
        for lag in range(self.width):
            shifted = padded[:, before - lag : before - lag + tokens]
            if age is not None:
                shifted = jnp.where((age >= lag)[..., None], shifted, 0)
            total = total + shifted * taps[lag]
        return total


class SwiGLU(nnx.Module):
    """Gated feed-forward layer (Shazeer, 2020, arXiv:2002.05202).

    Of long sequences it computes some tokens after the others, and again in the backward pass: with
    `remat` a layer's feed-forward is recomputed once all the same.
    """

    def __init__(self, dim: int, hidden: int, dtype, *, output_scale: float, rngs: nnx.Rngs):
        self.gate = Linear((dim, hidden), ("model", "hidden"), dtype, rngs=rngs)
        self.up = Linear((dim, hidden), ("model", "hidden"), dtype, rngs=rngs)
        self.down = Linear((hidden, dim), ("hidden", "model"), dtype, scale=output_scale, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, dim] to [B, T, dim]."""
        kernels = tuple(layer.whole_kernel() for layer in (self.gate, self.up, self.down))
        chunks = -(-x.shape[1] // TOGETHER) or 1
        size = even_size(x.shape[1], chunks, _ROWS)
        return map_chunks(self._of_chunk, x, kernels, size=size, saved=())

    def _of_chunk(self, _, x: jax.Array, kernels: tuple[jax.Array, ...]) -> jax.Array:
        gate, up, down = kernels
        x = enter_split(x)
        hidden = nnx.silu(self.gate.multiply(x, gate)) * self.up.multiply(x, up)
        return self.down.multiply(hidden, down)
