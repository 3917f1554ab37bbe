"""A decoder-only Transformer with a pattern of local, sparse and baselines' attention layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.mesh_axes import vary_with
from sparsex_jax.config import BASELINES, ConfigError, ModelConfig
from sparsex_jax.modules.attending import attending_for_loss
from sparsex_jax.modules.attention import Remembered, SparseXAttention
from sparsex_jax.modules.baselines import BaselineAttention, more_hidden
from sparsex_jax.modules.cross_entropy import cross_entropy
from sparsex_jax.modules.layers import RMSNorm, SwiGLU
from sparsex_jax.modules.repeats import apply_layers
from sparsex_jax.parallel import sequence
from sparsex_jax.parallel.mesh import axis_size
from sparsex_jax.parallel.rules import whole
from sparsex_jax.selection_loss import sample_queries


class Block(nnx.Module):
    """Attention and SwiGLU, each behind a norm and beside a residual connection.

    Args:
      config: of the model.
      number: of the layer, from 0; its letter in `config.layers` says what attends.
      rngs: random streams; "params" is used.
    """

    def __init__(self, config: ModelConfig, number: int, *, rngs: nnx.Rngs):
        kind, hidden = config.layers[number], config.mlp_dim
        self.attention_norm = RMSNorm(config.model_dim)
        if kind in BASELINES:
            self.attention: SparseXAttention = BaselineAttention(config, number, rngs=rngs)
            hidden += more_hidden(config)
        else:
            self.attention = SparseXAttention(config, kind, rngs=rngs)
        self.mlp_norm = RMSNorm(config.model_dim)
        self.mlp = SwiGLU(
            config.model_dim, hidden, jnp.dtype(config.dtype),
            output_scale=(2 * len(config.layers)) ** -0.5, rngs=rngs,
        )  # fmt: skip

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """[B, T, C] to [B, T, C], residual included."""
        return x + self.mlp(self.mlp_norm(x))

    def __call__(
        self, x, tokens, segment_ids=None, top_k=None, implementation=None,
        sequence_strategy="auto", attending=None,
    ) -> jax.Array:  # fmt: skip
        """[B, T, C] to [B, M, C], of the tokens that attend; arguments as in `SparseXAttention`."""
        attended = self.attention(
            self.attention_norm(x), tokens, segment_ids, top_k, implementation, sequence_strategy,
            attending,
        )  # fmt: skip
        return self.feed_forward(x[:, x.shape[1] - attended.shape[1] :] + attended)

    def read(self, x: jax.Array, tokens: jax.Array, *options) -> tuple[jax.Array, Remembered]:
        """What `__call__` returns, and what later tokens need; options as there."""
        attended, remembered = self.attention.read(self.attention_norm(x), tokens, *options)
        return self.feed_forward(x + attended), remembered


class Transformer(nnx.Module):
    """RMSNorm, SwiGLU, QK-norm, short convolution, tied embedding.

    Within `jax.shard_map` over the axes of `sparsex_jax.parallel.mesh` it holds a device's part of
    the parameters and takes a device's part of the tokens.

    Attributes:
      sharded: that it does so, for `sparsex_jax.training`.

    Args:
      config: the model's shape.
      rngs: random streams; "params" is used.
    """

    sharded = True

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(config.model_dim**-0.5)
        self.embedding = nnx.Param(
            init(rngs.params(), (config.vocab_size, config.model_dim), jnp.float32),
            axis_names=("vocab", "model"),
        )
        self.blocks = nnx.List(
            Block(config, number, rngs=rngs) for number in range(len(config.layers))
        )
        self.final_norm = RMSNorm(config.model_dim)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [B, T] to [B, T, C]."""
        rows = whole(self.embedding)[tokens] * self.config.model_dim**0.5
        return rows.astype(self.config.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., C] to f32 [..., vocab]."""
        table = whole(self.embedding, self.config.dtype)
        return jnp.einsum("...c,vc->...v", hidden, table, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        top_k: int | None = None,
        implementation: str | None = None,
        sequence_strategy: str = "auto",
    ) -> jax.Array:
        """Hidden states before the logits.

        Args:
          tokens: int32 [B, T].
          segment_ids: int [B, T]; packed documents, each starting at a block boundary.
          top_k: blocks selected in sparse layers, instead of the config's.
          implementation: of the primitives.
          sequence_strategy: as in `MeshConfig`, for a sequence that is split.

        Returns:
          [B, T, C] in the config's dtype.
        """
        options = top_k, implementation, sequence_strategy
        return self._hidden(tokens, tokens.shape[1], None, segment_ids, *options)[0]

    def prefill(
        self,
        tokens: jax.Array,
        top_k: int | None = None,
        implementation: str | None = None,
        sequence_strategy: str = "auto",
    ) -> tuple[jax.Array, list[Remembered]]:
        """Reads a context, a device's part of it where "seq" splits it.

        Args:
          tokens: int32 [B, T].
          top_k, implementation, sequence_strategy: as in `__call__`.

        Returns:
          The logits after the whole sequence's last token, f32 [B, vocab], and what each layer
          has to remember.
        """

        def apply(block: Block, x):
            return block.read(x, tokens, top_k, implementation, sequence_strategy)

        x, remembered = apply_layers(self.blocks, apply, self.embed(tokens))
        return sequence.of_last(self.logits(self.final_norm(x[:, -1]))), remembered

    def _hidden(
        self, tokens, outputs, queries, segment_ids, *options
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states of the last tokens, [B, outputs, C], and what scores have not learned, [B].

        That is the sum of the sparse layers' selection losses for `queries`, counted among the
        outputs; None for none.
        """
        x, length = self.embed(tokens), tokens.shape[1]
        counts = attending_for_loss(self.config, length, outputs)

        def apply_with(attending: int):
            def apply(block: Block, carry):
                x, unlearned = carry
                ids, own = (
                    None if each is None else each[:, length - x.shape[1] :]
                    for each in (segment_ids, tokens)
                )
                if queries is not None and block.attention.sparse:
                    unlearned += block.attention.selection_loss(
                        block.attention_norm(x), own, queries + attending - outputs, ids, attending
                    )
                return (block(x, own, ids, *options, attending), unlearned), None

            return apply if self.config.remat == "none" else nnx.remat(apply)

        carry = x, vary_with(x, jnp.zeros(len(tokens), jnp.float32))
        again = self.config.remat == "repetition"
        whole = counts.count(length)  # layers, the first ones
        if whole:
            carry, _ = apply_layers(self.blocks[:whole], apply_with(length), carry, remat=again)
        for block, attending in zip(self.blocks[whole:], counts[whole:], strict=True):
            carry, _ = apply_with(attending)(block, carry)
        x, unlearned = carry
        return self.final_norm(x), unlearned

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        segment_ids: jax.Array | None = None,
        top_k: int | None = None,
        implementation: str | None = None,
        sequence_strategy: str = "auto",
        loss_tokens: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """What is minimised: weighted negative log-likelihood, and the config's `selection_loss`.

        The divergence of a sequence's block scores weighs as much as its tokens do together.
        Where only the last tokens count, layers compute what these need (`attending.py`).

        Args:
          tokens: int32 [B, T].
          targets: int32 [B, T], the token that follows each.
          weights: f32 [B, T].
          segment_ids: as in `__call__`, and so the three below.
          top_k: blocks selected.
          implementation: of the primitives.
          sequence_strategy: for a sequence that is split.
          loss_tokens: M; only the last M tokens of a sequence count, None for all.

        Returns:
          (weighted sum, sum of weights), f32 scalars, of the tokens of the device that count.

        Raises:
          ConfigError: `loss_tokens` where sequences are split.
        """
        if loss_tokens is not None:
            if axis_size("seq") > 1:
                raise ConfigError(
                    f"loss_tokens={loss_tokens} needs whole sequences: use mesh.seq=1, or None"
                )
            targets, weights = (x[:, -loss_tokens:] for x in (targets, weights))
        queries = sample_queries(weights) if self.config.selection_loss else None
        hidden, unlearned = self._hidden(
            tokens, targets.shape[1], queries, segment_ids, top_k, implementation,
            sequence_strategy,
        )  # fmt: skip
        total = self._nll(hidden, targets, weights)
        if queries is not None:
            total += self.config.selection_loss * jnp.sum(unlearned * jnp.sum(weights, axis=1))
        return total, jnp.sum(weights)

    def nll(self, tokens: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The weighted sum of the negative log-likelihoods alone, f32; arguments as in `loss`."""
        return self._nll(self(tokens), targets, weights)

    def _nll(self, hidden, targets, weights) -> jax.Array:
        """With logits of `loss_chunk` tokens at a time."""
        flat = hidden.reshape(targets.size, hidden.shape[2]), targets.ravel(), weights.ravel()
        chunk = max(1, min(self.config.loss_chunk, targets.size))
        chunks = -(-targets.size // chunk)
        padding = chunks * chunk - targets.size
        hidden, targets, weights = (
            jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(
                chunks, chunk, *x.shape[1:]
            )
            for x in flat
        )
        table = whole(self.embedding, self.config.dtype)

        def add_chunk(total, inputs):
            hidden, targets, weights = inputs
            return total + jnp.sum(cross_entropy(hidden, table, targets) * weights), None

        begin = vary_with(hidden, jnp.float32(0))
        return jax.lax.scan(add_chunk, begin, (hidden, targets, weights))[0]
