"""What a token of an answer attends to besides selected blocks: landmarks and window side by side.

From one multiple of S to the next a(t) stays the same, and so does what is seen of the landmarks.
So they are gathered once for such a block of tokens, and each token only adds its own key and
value: in decoding each step of a program counts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.range_attention import range_attention
from sparsex_jax.branches import Ranges
from sparsex_jax.config import AttentionConfig
from sparsex_jax.fusion import Branch


class Near(NamedTuple):
    """M landmarks, the `reach` tokens before a block of tokens, and room for those of the block.

    Attributes:
      k: [B, M + `reach` + S + 1, Hkv, D]; those of the window have RoPE.
      v: likewise.
      bias: f32 [B, Hkv, M + `reach` + S + 1], as kernels take it; None without landmarks.
      first: position of the first token of the block, int32 [B], all the same.
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    first: jax.Array

    @classmethod
    def open(
        cls,
        window: tuple[jax.Array, jax.Array],
        landmarks: Ranges | None,
        first: jax.Array,
        config: AttentionConfig,
    ) -> "Near":
        """Before the first token of a block.

        Args:
          window: keys, with RoPE, and values of the `reach` tokens before it.
          landmarks: that it sees, all of the list; None for none.
          first: its position, int32 scalar.
          config: of the attention.
        """
        room = [jnp.zeros_like(x[:, : config.block_size + 1]) for x in window]
        k, v = (jnp.concatenate(x, axis=1) for x in zip(window, room, strict=True))
        bias = None
        if landmarks is not None:
            none = jnp.zeros(k.shape[:3], jnp.float32)
            k, v, bias = (
                jnp.concatenate((x, y), axis=1)
                for x, y in ((landmarks.k, k), (landmarks.v, v), (landmarks.bias, none))
            )
            bias = bias.swapaxes(1, 2)
        return cls(k, v, bias, jnp.broadcast_to(first, len(k)).astype(jnp.int32))

    def write(self, k: jax.Array, v: jax.Array, position: jax.Array, config) -> "Near":
        """With the token at a position, keys [B, 1, Hkv, D] with RoPE."""
        place = self._landmarks(config) + reach(config) + position - self.first[0]
        return self._replace(
            k=jax.lax.dynamic_update_slice_in_dim(self.k, k, place, axis=1),
            v=jax.lax.dynamic_update_slice_in_dim(self.v, v, place, axis=1),
        )

    def window(self, length: jax.Array, config: AttentionConfig) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the `reach` tokens before a position in the block or at its end."""
        begin = self._landmarks(config) + length - self.first[0]
        k, v = (
            jax.lax.dynamic_slice_in_dim(x, begin, reach(config), axis=1) for x in (self.k, self.v)
        )
        return k, v

    def attend(
        self,
        turned_q: jax.Array,
        q: jax.Array,
        position: jax.Array,
        local_start: jax.Array,
        config: AttentionConfig,
        implementation: str | None,
    ) -> tuple[Branch, Branch | None]:
        """The branches of the window and of the landmarks, by one call, as two queries.

        Args:
          turned_q: of the token at the position, with RoPE, [B, 1, Hq, D].
          q: the same without.
          position: int32 scalar.
          local_start: a(t), int32 scalar.
          config: of the attention.
          implementation: of the primitives.

        Returns:
          (window, landmarks; None where there are none).
        """
        marks = self._landmarks(config)
        first_key = self.first[0] - reach(config) - marks  # position of the first key, were it one
        span = local_start - first_key, position + 1 - first_key
        if self.bias is None:
            start, end = (jnp.full(1, x, jnp.int32) for x in span)
            branch = range_attention(
                turned_q, self.k, self.v, start, end, implementation=implementation
            )
            return branch, None
        start, end = (jnp.stack((jnp.int32(y), x)) for x, y in zip(span, (0, marks), strict=True))
        out, lse = range_attention(
            jnp.concatenate((q, turned_q), axis=1), self.k, self.v, start, end,
            self.bias.swapaxes(1, 2), implementation=implementation,
        )  # fmt: skip
        return (out[:, 1:], lse[:, 1:]), (out[:, :1], lse[:, :1])

    def _landmarks(self, config: AttentionConfig) -> int:
        """M."""
        return self.k.shape[1] - reach(config) - config.block_size - 1


def reach(config: AttentionConfig) -> int:
    """Tokens whose window keys are kept: with a new one a multiple of 8, as kernels take them."""
    return config.window + config.block_size + 7


def left_in_block(position: jax.Array, config: AttentionConfig) -> jax.Array:
    """Tokens from a position on, itself included, that have its a(t): at least 1, at most S."""
    return config.block_size - (position + 1) % config.block_size
