"""The attention layer: projections, learned features and gates around `sparse_attention`."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsex_jax.attention import sparse_attention
from sparsex_jax.config import AttentionConfig, ConfigError, ModelConfig
from sparsex_jax.modules.layers import CausalConvolution, Linear
from sparsex_jax.modules.ngrams import NO_TOKEN, Hashes, add_signs, hash_ngrams
from sparsex_jax.parallel import sequence
from sparsex_jax.parallel.mesh import axis_size
from sparsex_jax.parallel.rules import enter_split, own_part, whole
from sparsex_jax.scoring import BlockIndex, Blocks, pool_blocks, query_features, rms_normalize
from sparsex_jax.selection_loss import selection_loss

_RECENCY = -3.0  # at first 0.05 nats for each doubling of the distance
_SIGNS = 0.1  # weights of hashes' signs at first, beside projections of size 1


class KeySide(NamedTuple):
    """What a token contributes as something to be attended to.

    Attributes:
      k: [B, T, Hkv, D], normalised.
      v: [B, T, Hkv, D].
      salience: f32 [B, T, Hkv], or None in a local layer (so the two below).
      block_inputs: [B, T, Hkv, d_s], pooled into block features.
      block_logits: f32 [B, T, Hkv], weights of the pooling before their softmax.
    """

    k: jax.Array
    v: jax.Array
    salience: jax.Array | None
    block_inputs: jax.Array | None
    block_logits: jax.Array | None


class QuerySide(NamedTuple):
    """What a token attends with.

    Attributes:
      q: [B, T, Hq, D], normalised.
      features: u, scaled, [B, T, Hkv, d_s], or None in a local layer (so the two below).
      landmark_gate: f32 [B, T, Hq].
      dynamic_gate: f32 [B, T, Hq].
      recency: f32 [B, T, Hkv], see `branches.select_remote`; None without.
    """

    q: jax.Array
    features: jax.Array | None
    landmark_gate: jax.Array | None
    dynamic_gate: jax.Array | None
    recency: jax.Array | None = None


class Remembered(NamedTuple):
    """What a layer's later tokens need of those before, a device's part of it.

    Attributes:
      k: without RoPE, [B, T, Hkv, D]; in a local layer of the sequence's last `window` tokens.
      v: their values, likewise.
      history: the sequence's last inputs of the convolution, [B, conv_reach, C].
      tokens: the sequence's last, int32 [B, ngram_reach]; None in a layer without n-grams.
      salience: f32 [B, T, Hkv]; None in a local layer.
      blocks: T / S of them; likewise.
    """

    k: jax.Array
    v: jax.Array
    history: jax.Array
    tokens: jax.Array | None
    salience: jax.Array | None
    blocks: Blocks | None


class SparseXAttention(nnx.Module):
    """Attention layer with QK-norm, grouped-query heads and a short convolution.

    QK-norm has no learned scale but with `ModelConfig.qk_scale`: |q.k| / sqrt(D) is below sqrt(D),
    which tells the tokens of a block apart but not those of a long text, so that finding the block
    is left to the score. With a learned scale and no `selection_loss`, q.k does both while all
    blocks are selected, and the score learns nothing (docs/log.md).

    Args:
      config: widths, heads and the attention's own config.
      kind: a letter of `ModelConfig.layers`: "s" for all three branches, "l" for local attention
        only; a baseline's, with projections as local attention has them.
      rngs: random streams; "params" is used.
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        self.config, self.sparse = config, kind == "s"
        dim, dtype = config.model_dim, jnp.dtype(config.dtype)
        query_width = config.num_heads * config.head_dim
        key_width = config.num_kv_heads * config.head_dim
        self.convolution = (
            CausalConvolution(dim, config.conv_width, rngs=rngs) if config.conv_width else None
        )
        self.query = Linear((dim, query_width), ("model", "heads"), dtype, rngs=rngs)
        self.key = Linear((dim, key_width), ("model", "kv_heads"), dtype, rngs=rngs)
        self.value = Linear((dim, key_width), ("model", "kv_heads"), dtype, rngs=rngs)
        self.output = Linear(
            (query_width, dim), ("heads", "model"), dtype,
            scale=(2 * len(config.layers)) ** -0.5, rngs=rngs,
        )  # fmt: skip
        if config.qk_scale:
            zeros = jnp.zeros(config.num_heads, jnp.float32)
            self.qk_log_scale = nnx.Param(zeros, axis_names=("heads",))
        self.ngrams = config.ngrams_of(kind)
        if self.ngrams:
            self.query_log_signs = self._log_signs(config.num_heads, "heads")
            self.key_log_signs = self._log_signs(config.num_kv_heads, "kv_heads")
        if not self.sparse:
            return
        heads, score_width = config.num_kv_heads, config.num_kv_heads * config.attention.score_dim
        self.score_query = Linear((dim, score_width), ("model", "kv_heads"), dtype, rngs=rngs)
        self.score_key = Linear((dim, score_width), ("model", "kv_heads"), dtype, rngs=rngs)
        self.pool = Linear((dim, heads), ("model", "kv_heads"), jnp.float32, rngs=rngs)
        self.salience = Linear((dim, heads), ("model", "kv_heads"), jnp.float32, rngs=rngs)
        self.log_scale = nnx.Param(jnp.zeros(heads, jnp.float32), axis_names=("kv_heads",))
        # Two gates a head, side by side: their axis is not split as heads are.
        self.gates = Linear(
            (dim, 2 * config.num_heads), ("model", None), jnp.float32, scale=0.0, rngs=rngs
        )
        if config.attention.recency:
            self.recency = Linear(
                (dim, heads), ("model", "kv_heads"), jnp.float32, scale=0.0, rngs=rngs
            )

    def _log_signs(self, heads: int, axis: str) -> nnx.Param:
        """Logarithms: a weight that passed 0 would leave the other side's without a gradient."""
        shape = len(self.ngrams), heads
        return nnx.Param(jnp.full(shape, math.log(_SIGNS), jnp.float32), axis_names=(None, axis))

    @property
    def ngram_reach(self) -> int:
        """Tokens before each that belong to its n-grams."""
        return max(self.ngrams, default=0)

    def mix(
        self, x: jax.Array, history: jax.Array | None = None, age: jax.Array | None = None
    ) -> jax.Array:
        """The convolution, [B, T, C].

        Args:
          x: [B, T, C].
          history, age: as in `CausalConvolution`.
        """
        return x if self.convolution is None else self.convolution(x, history, age)

    def hash(
        self,
        tokens: jax.Array,
        history: jax.Array | None = None,
        age: jax.Array | None = None,
    ) -> Hashes | None:
        """Of the n-grams before each token; None where there are none.

        Args:
          tokens: int32 [B, T].
          history: the `ngram_reach` tokens before, as in `hash_ngrams`.
          age: int [B, T], likewise.
        """
        return hash_ngrams(tokens, self.ngrams, history, age) if self.ngrams else None

    def key_side(self, x: jax.Array, mixed: jax.Array, hashes: Hashes | None = None) -> KeySide:
        """Projects the layer's input [B, T, C] and its convolution to what is attended to."""
        k = self._heads(self.key(mixed), self.config.num_kv_heads)
        if hashes is not None:
            k = add_signs(k, hashes.before, jnp.exp(whole(self.key_log_signs)))
        k = rms_normalize(k)
        v = self._heads(self.value(mixed), self.config.num_kv_heads)
        if not self.sparse:
            return KeySide(k, v, None, None, None)
        inputs = self._heads(self.score_key(mixed), self.config.num_kv_heads)
        return KeySide(k, v, self.salience(x), inputs, self.pool(mixed))

    def query_side(self, x: jax.Array, mixed: jax.Array, hashes: Hashes | None = None) -> QuerySide:
        """Projects the layer's input [B, T, C] and its convolution to what attends."""
        q = self._heads(self.query(mixed), self.config.num_heads)
        if hashes is not None:
            q = add_signs(q, hashes.ending, jnp.exp(whole(self.query_log_signs)))
        q = rms_normalize(q)
        if self.config.qk_scale:
            q *= jnp.exp(whole(self.qk_log_scale))[:, None].astype(q.dtype)
        if not self.sparse:
            return QuerySide(q, None, None, None)
        projected = self._heads(self.score_query(mixed), self.config.num_kv_heads)
        features = query_features(projected, whole(self.log_scale))
        gates = jnp.split(2 * nnx.sigmoid(self.gates(x)), 2, axis=-1)
        recency = None
        if self.config.attention.recency:
            recency = nnx.softplus(self.recency(mixed) + _RECENCY)
        return QuerySide(q, features, *(own_part(gate, axis=2) for gate in gates), recency)

    def attention_config(self, top_k: int | None = None) -> AttentionConfig:
        """The layer's own attention config; `top_k` replaces the config's in a sparse layer."""
        config = self.config.attention
        if not self.sparse:
            return dataclasses.replace(config, top_k=0, landmarks="off")
        return config if top_k is None else dataclasses.replace(config, top_k=top_k)

    def project_out(self, attended: jax.Array) -> jax.Array:
        """[B, T, Hq, D] to [B, T, C]."""
        batch, tokens, heads, dim = attended.shape
        return self.output(attended.reshape(batch, tokens, heads * dim))

    def __call__(
        self,
        x: jax.Array,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        top_k: int | None = None,
        implementation: str | None = None,
        sequence_strategy: str = "auto",
        attending: int | None = None,
    ) -> jax.Array:
        """Attends within x.

        Args:
          x: [B, T, C], normalised; a device's tokens where "seq" splits them.
          tokens: int32 [B, T], whose n-grams are matched.
          segment_ids: int [B, T], as in `sparse_attention`.
          top_k: blocks selected, instead of the config's.
          implementation: of the primitives.
          sequence_strategy: as in `MeshConfig`.
          attending: M, how many of the tokens attend, the last ones; None for all.

        Returns:
          [B, M, C].
        """
        keys, queries = self._project(x, tokens, segment_ids, attending)
        attended = self.attend(
            keys, queries, segment_ids, top_k, implementation, sequence_strategy
        )  # fmt: skip
        return self.project_out(attended)

    def read(self, x: jax.Array, tokens: jax.Array, *options) -> tuple[jax.Array, Remembered]:
        """What `__call__` returns, and what later tokens need; options as in `attend`."""
        keys, queries = self._project(x, tokens, None)
        attended = self.project_out(self.attend(keys, queries, None, *options))
        history, last = sequence.of_last(_last(x, self.config.conv_reach)), None
        if self.ngrams:
            last = sequence.of_last(_last(tokens, self.ngram_reach, NO_TOKEN))
        if not self.sparse:
            window = self.config.attention.window
            k, v = (sequence.of_last(each[:, -window:]) for each in (keys.k, keys.v))
            return attended, Remembered(k, v, history, last, None, None)
        blocks = pool_blocks(keys.block_inputs, keys.block_logits, self.config.attention)
        return attended, Remembered(keys.k, keys.v, history, last, keys.salience, blocks)

    def _project(self, x, tokens, segment_ids, attending=None) -> tuple[KeySide, QuerySide]:
        """Both sides of x, whose convolution and n-grams look into the part to the left, too.

        Queries are those of the last `attending` tokens, None for all.
        """
        age = None
        if segment_ids is not None:
            positions = sequence.first_position(x.shape[1]) + jnp.arange(x.shape[1])
            age = positions - sequence.document_starts(segment_ids)
        history = last = None
        if axis_size("seq") > 1 and self.config.conv_reach:
            history = sequence.from_left(x, self.config.conv_reach)
        if axis_size("seq") > 1 and self.ngrams:
            # The first device has zeros from its left, where there is no token.
            last = sequence.from_left(tokens - NO_TOKEN, self.ngram_reach) + NO_TOKEN
        mixed = enter_split(self.mix(x, history, age))
        hashes = self.hash(tokens, last, age)
        keys = self.key_side(enter_split(x), mixed, hashes)
        if attending is not None:
            first = x.shape[1] - attending
            x, mixed, hashes = jax.tree.map(lambda y: y[:, first:], (x, mixed, hashes))
        return keys, self.query_side(x, mixed, hashes)

    def attend(
        self,
        keys: KeySide,
        queries: QuerySide,
        segment_ids: jax.Array | None,
        top_k: int | None,
        implementation: str | None,
        sequence_strategy: str,
    ) -> jax.Array:
        """Attention of projected tokens, [B, T, Hq, D]; arguments as in `__call__`."""
        config = self.attention_config(top_k)
        learned = {}
        if config.landmarks != "off":
            learned["salience"] = keys.salience
        if config.top_k:
            learned["query_features"] = queries.features
            blocks = pool_blocks(keys.block_inputs, keys.block_logits, config)
            learned |= {"block_features": blocks.features, "block_mass": blocks.mass}
            learned["recency"] = queries.recency
        if config.fusion == "sum":
            if config.landmarks != "off":
                learned["landmark_gate"] = queries.landmark_gate
            if config.top_k:
                learned["dynamic_gate"] = queries.dynamic_gate
        if axis_size("seq") == 1:
            attend = sparse_attention
        else:
            attend = functools.partial(sequence.sparse_attention, strategy=sequence_strategy)
        return attend(
            queries.q, keys.k, keys.v, config=config, segment_ids=segment_ids,
            implementation=implementation, **learned,
        )  # fmt: skip

    def selection_loss(
        self,
        x: jax.Array,
        tokens: jax.Array,
        queries: jax.Array,
        segment_ids: jax.Array | None = None,
        attending: int | None = None,
    ) -> jax.Array:
        """What the block scores of a sparse layer have to learn of each sequence, f32 [B].

        Args:
          x: [B, T, C], the layer's input.
          tokens: int32 [B, T].
          queries: int32 [B, Q], numbers of tokens among those that attend
            (`selection_loss.sample_queries`).
          segment_ids: as in `__call__`.
          attending: likewise.

        Raises:
          ConfigError: sequences are split.
        """
        if axis_size("seq") > 1:
            raise ConfigError(
                f"selection_loss={self.config.selection_loss} needs whole sequences: use"
                " mesh.seq=1, or selection_loss=0"
            )
        start = None if segment_ids is None else sequence.document_starts(segment_ids)
        keys, side = self._project(x, tokens, segment_ids, attending)
        config = self.config.attention
        blocks = pool_blocks(keys.block_inputs, keys.block_logits, config)
        index = BlockIndex.of(blocks, config)
        loss = selection_loss(side.q, keys.k, side.features, index, queries, start, config)
        size = axis_size("tensor")
        return loss if size == 1 else jax.lax.psum(loss, "tensor") / size

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        heads //= axis_size("tensor")
        return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def _last(x: jax.Array, count: int, fill: int = 0) -> jax.Array:
    """The last tokens of [B, T, ...], behind `fill` where there are fewer."""
    missing = max(count - x.shape[1], 0)
    padded = jnp.pad(x, ((0, 0), (missing, 0)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return padded[:, padded.shape[1] - count :]
