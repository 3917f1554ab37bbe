"""What tokens attend to, layer by layer: slow and exact, for finding out why a model errs."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsex_jax.baselines.pattern import Pattern, random_blocks
from sparsex_jax.branches import select_remote
from sparsex_jax.cache.baselines import AllTokens, FirstTokens
from sparsex_jax.cache.device import DeviceRemote
from sparsex_jax.cache.engine import SUFFIX_UNIT, Cache
from sparsex_jax.cache.layer import LayerCache, extend_layer
from sparsex_jax.cache.model import Layers, extend, join_layers, kinds_of, split_layers
from sparsex_jax.cache.tiers import Tier
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.modules.attention import QuerySide
from sparsex_jax.modules.transformer import Transformer
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.spans import remote_end


class Attended(NamedTuple):
    """What a token attends to, over all layers and heads.

    Attributes:
      selected: whether some head can attend to the place asked for: it is in the window, in a
        selected block, or in what the pattern of a baseline shows; bool scalar.
      weight: the largest share of a head's softmax that the span asked for gets, times the gate of
        selected blocks where they have one, f32 scalar.
    """

    selected: jax.Array
    weight: jax.Array


class _Softmax(NamedTuple):
    """What a query has one softmax over.

    Attributes:
      parts: keys that have queries of their own.
      gate: what the result is multiplied by, f32 [Hkv, G] or a scalar.
    """

    parts: list["_Keys"]
    gate: jax.Array | float = 1.0

    def shares(self) -> tuple[jax.Array, jax.Array]:
        """Positions [Hkv, M], and shares times the gate, f32 [Hkv, G, M]; NaN without keys."""
        places = jnp.concatenate([part.place for part in self.parts], axis=-1)
        logits = jnp.concatenate([part.logits for part in self.parts], axis=-1)
        return places, jax.nn.softmax(logits) * jnp.asarray(self.gate)[..., None]


class _Keys(NamedTuple):
    """Keys that a query may attend to, and their logits.

    Attributes:
      place: positions, int32 [Hkv, M]; -1 where there is none.
      logits: f32 [Hkv, G, M], -inf where there is none.
    """

    place: jax.Array
    logits: jax.Array

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, place: jax.Array, bias: jax.Array) -> "_Keys":
        """Of q [1, 1, Hq, D], k [M, Hkv, D], place int32 [M, Hkv] and bias f32 [M, Hkv]."""
        grouped = q.reshape(k.shape[1], -1, q.shape[-1]).astype(jnp.float32)
        logits = jnp.einsum("hgd,mhd->hgm", grouped, k.astype(jnp.float32))
        logits = logits * q.shape[-1] ** -0.5 + bias.T[:, None]
        return cls(place.T, jnp.where((place >= 0).T[:, None], logits, -jnp.inf))


def explain(
    model: Transformer, cache: Cache, tokens: np.ndarray, place: int, span: tuple[int, int]
) -> Attended:
    """Reads tokens behind a context and tells what of the past the last of them attends to.

    Landmarks do not count. The dynamic branch and the window each have a softmax of their own with
    fusion="sum"; else, and in baselines, it is one.

    Args:
      model: whose cache it is.
      cache: of one sequence, in the tier "device", with room for the tokens; it can be used again.
      tokens: int [Q], Q >= 1.
      place: position of a token before the last one.
      span: begin and end of the tokens around that one.
    """
    kinds = kinds_of(cache.layers)
    kept, appended = split_layers(cache.layers)
    counts = np.int32(cache.length), np.int32(len(tokens) - 1)
    found, appended = _explain(
        model, kept, _filled(tokens[:-1]), np.int32(tokens[-1]), np.int32(place),
        tuple(map(np.int32, span)), counts, appended=appended, kinds=kinds,
    )  # fmt: skip
    cache.layers = join_layers(kinds, kept, appended)
    return found


@functools.partial(nnx.jit, donate_argnames="appended", static_argnames="kinds")
def _explain(
    model: Transformer, kept, before, token, place, span, counts,
    *, appended, kinds: tuple[Any, ...],
):  # fmt: skip
    """For `explain`; counts are the tokens of the cache, and of `before`."""
    length, asked = counts
    layers = join_layers(kinds, kept, appended)
    layers = extend(model, layers, before[None], length, asked, logits=False)[1]
    softmaxes, layers = _read_one(model, layers, token, length + asked)
    found = [_measure(softmax, place, span) for layer in softmaxes for softmax in layer]
    attended = Attended(
        jnp.stack([each.selected for each in found]).any(),
        jnp.stack([each.weight for each in found]).max(),
    )
    return attended, split_layers(layers)[1]


def why_unknown(tier: Tier, config: ModelConfig) -> str | None:
    """Why `attention_of_answer` cannot tell what an answer attends to; None if it can."""
    if "s" not in config.layers:
        return f"layers={config.layers!r} has no sparse layer, whose attention could be told"
    if tier != "device":
        return f"what an answer attends to is known in tier='device' only, not {tier!r}"
    return None


def attention_of_answer(
    model: Transformer, cache: Cache, question: np.ndarray, answer: np.ndarray
) -> np.ndarray:
    """How much each token of a context is attended to while an answer is generated.

    The sum over the answer's tokens, query heads and softmaxes of sparse layers, landmarks aside,
    of squares of shares times gates: what a head singles out counts, and hardly what it averages
    over, nor what a closed gate leaves out. A softmax over the window counts as far as it reaches
    into the context.

    Args:
      model: whose cache it is; see `why_unknown`.
      cache: of one sequence, in the tier "device", with room for question and answer; it can be
        used again.
      question: int [Q], Q >= 1.
      answer: int [A], A >= 1, that the model gave; what follows a -1 does not count.

    Returns:
      f32 [N], N being the cache's length.

    Raises:
      ValueError: no layer of the cache is a sparse one in the tier "device".
    """
    kinds = kinds_of(cache.layers)
    if DeviceRemote not in kinds:
        raise ValueError("the cache has no sparse layer in tier='device': use one that has")
    answer = answer[: np.argmax(np.append(answer, -1) < 0)]
    kept, appended = split_layers(cache.layers)
    counts = np.int32(cache.length), np.int32(len(question) - 1), np.int32(len(answer))
    before = _filled(question[:-1])
    # A program for answers of many lengths: what is filled up is not read.
    read = _filled(np.append(question[-1:], answer[:-1]), 4 * SUFFIX_UNIT)
    total, appended = _attention_of(
        model, kept, before, read, counts, appended=appended, kinds=kinds
    )  # fmt: skip
    cache.layers = join_layers(kinds, kept, appended)
    return np.asarray(total[: cache.length])


def _filled(tokens: np.ndarray, unit: int = SUFFIX_UNIT) -> np.ndarray:
    """Tokens int32 [N], and zeros up to the next multiple of a unit, one at least."""
    size = unit * max(1, -(-len(tokens) // unit))
    return np.pad(tokens.astype(np.int32), (0, size - len(tokens)))


@functools.partial(nnx.jit, donate_argnames="appended", static_argnames="kinds")
def _attention_of(
    model: Transformer, kept, before, read, counts, *, appended, kinds: tuple[Any, ...]
):  # fmt: skip
    """For `attention_of_answer`; counts are the tokens of the cache, and of `before` and `read`."""
    layers = join_layers(kinds, kept, appended)
    length, asked, answered = counts
    layers = extend(model, layers, before[None], length, asked, logits=False)[1]
    capacity = max(x.remote.k.shape[1] for x in layers if isinstance(x.remote, DeviceRemote))

    def read_token(number, carry):
        layers, total = carry
        softmaxes, layers = _read_one(model, layers, read[number], length + asked + number)
        sparse = [x for x, kind in zip(softmaxes, kinds, strict=True) if kind is DeviceRemote]
        for softmax in itertools.chain.from_iterable(sparse):
            places, shares = softmax.shares()
            squared = jnp.sum(jnp.nan_to_num(shares) ** 2, axis=1)
            places = jnp.where(places < 0, capacity, places)
            total = total.at[places].add(squared, mode="drop")
        return layers, total

    start = layers, jnp.zeros(capacity, jnp.float32)
    layers, total = jax.lax.fori_loop(0, answered, read_token, start)
    return total, split_layers(layers)[1]


def _read_one(
    model: Transformer, layers: Layers, token: jax.Array, length: jax.Array
) -> tuple[list[list[_Softmax]], Layers]:
    """Reads a token: the softmaxes of each layer, and the new caches."""
    tokens = token[None, None]
    x: jax.Array | None = model.embed(tokens)
    softmaxes, read = [], []
    for block, layer in zip(model.blocks, layers, strict=True):
        attention = block.attention
        normed = block.attention_norm(x)
        queries = attention.query_side(
            normed,
            attention.mix(normed, layer.recent.history),
            attention.hash(tokens, layer.recent.tokens),
        )
        x, after = extend_layer(block, layer, x, tokens, length, jnp.int32(1), attending=1)
        softmaxes.append(_softmaxes(queries, after, length, attention.attention_config()))
        read.append(after)
    return softmaxes, tuple(read)


def _softmaxes(
    queries: QuerySide, cache: LayerCache, position: jax.Array, config: AttentionConfig
) -> list[_Softmax]:
    """The softmaxes of a layer."""
    local_start = remote_end(position, 0, config)
    plain = queries.q
    turned = apply_rotary(plain, position[None], config.rope_base)
    assert cache.recent.window_k is not None  # no block is open
    k = cache.recent.window_k[0]
    place = position + 1 - len(k) + jnp.arange(len(k), dtype=jnp.int32)
    window = _of_places(turned, k, jnp.where(place >= local_start, place, -1))
    far = queries._replace(q=turned if config.turns_remote else plain)
    remote = _remote_keys(far, cache.remote, position, local_start, config)
    if remote is None:
        return [_Softmax([window])]
    if config.fusion == "softmax":
        return [_Softmax([window, remote])]
    assert queries.dynamic_gate is not None  # of a sparse layer
    gate = queries.dynamic_gate[0, 0].reshape(remote.logits.shape[:2])
    return [_Softmax([window]), _Softmax([remote], gate)]


def _of_places(q: jax.Array, k: jax.Array, place: jax.Array) -> _Keys:
    """Keys [M, Hkv, D] at places [M], without bias."""
    shared = jnp.broadcast_to(place[:, None], k.shape[:2])
    return _Keys.of(q, k, shared, jnp.zeros(shared.shape, jnp.float32))


def _remote_keys(
    queries: QuerySide, remote, position: jax.Array, local_start: jax.Array, config: AttentionConfig
) -> _Keys | None:
    """What a layer's query can attend to before its window."""
    if isinstance(remote, DeviceRemote):
        if not config.top_k:
            return None
        index, bias = select_remote(
            queries.features, remote.block_index, local_start[None], None, config,
            recency=queries.recency,
        )  # fmt: skip
        return _of_blocks(queries.q, remote.k[0], index[0, 0], bias[0, 0], config.block_size)
    if isinstance(remote, FirstTokens):
        place = jnp.arange(remote.k.shape[1], dtype=jnp.int32)
        return _of_places(queries.q, remote.k[0], jnp.where(place < local_start, place, -1))
    if isinstance(remote, AllTokens):
        assert isinstance(config, Pattern)
        if config.kind == "dense":
            place = jnp.arange(remote.k.shape[1], dtype=jnp.int32)
            return _of_places(queries.q, remote.k[0], jnp.where(place < local_start, place, -1))
        size, heads = config.block_size, remote.k.shape[2]
        first = jnp.arange(config.global_tokens // size, dtype=jnp.int32)
        first = jnp.where(first < local_start // size, first, -1)
        index = jnp.concatenate((first, random_blocks(position[None], 0, config)[0]))
        index = jnp.broadcast_to(index, (heads, len(index)))
        return _of_blocks(queries.q, remote.k[0], index, jnp.zeros(index.shape, jnp.float32), size)
    return None


def _of_blocks(q: jax.Array, k: jax.Array, index: jax.Array, bias: jax.Array, size: int) -> _Keys:
    """Keys of blocks, numbers and biases [Hkv, K], of k [N, Hkv, D]."""
    place = index[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)
    place = jnp.where(index[:, :, None] < 0, -1, place).reshape(len(index), -1).T
    chosen = jnp.take_along_axis(k, jnp.maximum(place, 0)[..., None], axis=0)
    return _Keys.of(q, chosen, place, jnp.repeat(bias, size, axis=1).T)


def _measure(softmax: _Softmax, place: jax.Array, span) -> Attended:
    """Of one softmax."""
    places, shares = softmax.shares()
    within = (places >= span[0]) & (places < span[1])
    weight = jnp.where(within[:, None], shares, 0).sum(-1)
    return Attended((places == place).any(), jnp.max(jnp.nan_to_num(weight)))
