"""Choice of the next token from logits: the best one, or a random one of the likely ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sparsex_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: of the softmax; 0 takes the most likely token (ties: the lower number).
      top_p: the fewest most likely tokens whose probabilities sum to this much are drawn from
        (Holtzman et al., 2020, arXiv:1904.09751); 1 for all.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature={self.temperature} must be at least 0: use 0.7, say")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]: use 1 for all tokens")
        if self.temperature == 0 and self.top_p < 1:
            raise ConfigError(
                f"top_p={self.top_p} has no effect at temperature=0: use a temperature above 0, or"
                " top_p=1"
            )

    def choose(self, logits: jax.Array, seeds: jax.Array, step: jax.Array) -> jax.Array:
        """A token for each sequence, int32 [B].

        Args:
          logits: f32 [B, vocab].
          seeds: uint32 [B], of each sequence; what is drawn depends on no other.
          step: number of the token, int32 scalar.
        """
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def draw(logits, seed):
            key = jax.random.fold_in(jax.random.key(seed), step)
            return jax.random.categorical(key, likely(logits / self.temperature, self.top_p))

        return jax.vmap(draw)(logits, seeds).astype(jnp.int32)


GREEDY = Sampling()


def likely(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [vocab], -inf but for the fewest most likely tokens with probability `top_p`."""
    if top_p == 1:
        return logits
    order = jnp.argsort(logits, descending=True, stable=True)
    share = jax.nn.softmax(logits[order])
    before = jnp.cumsum(share) - share
    kept = jnp.zeros(logits.shape, bool).at[order].set((before < top_p).at[0].set(True))
    return jnp.where(kept, logits, -jnp.inf)
