"""The baselines' attention layer: that of Sparse-X with another attention in it."""

import jax
from flax import nnx

from sparsex_jax.baselines.attention import baseline_attention
from sparsex_jax.baselines.pattern import Pattern, make_pattern
from sparsex_jax.config import ConfigError, ModelConfig
from sparsex_jax.modules.attention import KeySide, QuerySide, SparseXAttention
from sparsex_jax.parallel.mesh import axis_size

_UNIT = 8  # hidden units that are added: as many devices may share them


class BaselineAttention(SparseXAttention):
    """Dense, Longformer's or BigBird's attention with the projections of a local layer.

    Args:
      config: of the model.
      number: of the layer, from 0; its letter in `config.layers` says which attention.
      rngs: random streams; "params" is used.
    """

    def __init__(self, config: ModelConfig, number: int, *, rngs: nnx.Rngs):
        super().__init__(config, config.layers[number], rngs=rngs)
        self.pattern = make_pattern(config, number)

    def attention_config(self, top_k: int | None = None) -> Pattern:
        """The layer's pattern; blocks are selected in sparse layers only."""
        return self.pattern

    def attend(
        self,
        keys: KeySide,
        queries: QuerySide,
        segment_ids: jax.Array | None,
        top_k: int | None,
        implementation: str | None,
        sequence_strategy: str,
    ) -> jax.Array:
        """Attention of projected tokens, [B, T, Hq, D]; the sequence must not be split."""
        if axis_size("seq") > 1:
            raise ConfigError(f"{self.pattern.kind} layers take whole sequences: use mesh.seq=1")
        return baseline_attention(
            queries.q, keys.k, keys.v, pattern=self.pattern, segment_ids=segment_ids,
            implementation=implementation,
        )  # fmt: skip


def more_hidden(config: ModelConfig) -> int:
    """Hidden units that SwiGLU of a baseline's layer has more, for equal numbers of parameters.

    They make up for what a sparse layer learns besides: scores, pooling, salience and gates.
    """
    heads, dim = config.num_kv_heads, config.model_dim
    learned = heads + dim * (2 * heads * config.attention.score_dim + 2 * heads)
    learned += 2 * dim * config.num_heads
    return round(learned / (3 * dim * _UNIT)) * _UNIT
