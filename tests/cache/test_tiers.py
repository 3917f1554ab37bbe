"""Tiers of the cache: the exact ones against the forward pass, the compressed one part by part."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.range_attention import range_attention
from sparsex_jax.cache import Engine, compressed, host
from sparsex_jax.cache.compressed import CompressedRemote, most_slots, partition
from sparsex_jax.cache.device import DeviceRemote, touched
from sparsex_jax.cache.layer import close_block, open_block
from sparsex_jax.cache.memory import Bytes, CacheMemoryError, Shape, check_fits
from sparsex_jax.cache.model import extend, map_layers
from sparsex_jax.cache.near import left_in_block
from sparsex_jax.config import ConfigError, ModelConfig
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.scoring import Blocks
from sparsex_jax.spans import remote_end
from tests.cache.test_engine import greedy
from tests.modules.test_transformer import ATTENTION, TINY, make, make_tokens

SPARSE_FIRST = dataclasses.replace(TINY, layers="sl")  # many tokens of a chunk attend in it


@pytest.fixture(scope="module")
def small_host():
    """Few slots and short pages, so that blocks are evicted and pages follow one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "SLOTS", 5)
        patch.setattr(host, "PAGE", 64)
        yield


@functools.cache
def engine(tier, chunk=48):
    return Engine(make(SPARSE_FIRST), capacity=256, chunk=chunk, tier=tier)


@pytest.mark.usefixtures("small_host")
def test_exact_tiers_equal_the_forward_pass():
    """Answers are so long that their own landmarks and blocks are attended to."""
    tokens = make_tokens(1, 150)
    expected = greedy(make(SPARSE_FIRST), tokens, 20)
    for tier in ("device", "host"):
        np.testing.assert_array_equal(engine(tier).generate(tokens, 20), expected)


@pytest.mark.usefixtures("small_host")
def test_exact_tiers_know_what_is_near():
    attention = dataclasses.replace(ATTENTION, near_reach=24, recency=True, top_k=3)
    model = make(dataclasses.replace(SPARSE_FIRST, attention=attention, qk_scale=True))
    tokens = make_tokens(1, 150)
    expected = greedy(model, tokens, 20)
    for tier in ("device", "host"):
        found = Engine(model, capacity=256, chunk=48, tier=tier).generate(tokens, 20)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ConfigError, match="has a recency of them: use tier='device'"):
        Engine(model, capacity=256, tier="compressed")


@pytest.mark.usefixtures("small_host")
def test_an_answer_leaves_nothing_behind_in_the_host_tier():
    """Long answers become old blocks, are selected and cached; another answer has others there."""
    tokens, found = make_tokens(1, 120), {}
    for tier in ("device", "host"):
        cache = engine(tier).prefill(tokens[:, :110])
        suffixes = tokens[:, 110:], tokens[:, 100:110], tokens[:, 110:]
        found[tier] = [engine(tier).answer(cache, suffix, 64) for suffix in suffixes]
    np.testing.assert_array_equal(found["host"], found["device"])
    np.testing.assert_array_equal(found["host"][0], found["host"][2])
    hits, misses = cache.block_hits
    assert hits > 0 and misses > 0 and (hits + misses) % TINY.num_kv_heads == 0


@pytest.mark.usefixtures("small_host")
@pytest.mark.parametrize("tier", [pytest.param("device", marks=pytest.mark.long), "host"])
def test_tokens_of_a_block_one_by_one(tier):
    """In an open block, whose landmarks wait until it is closed, logits are those of any token."""
    tokens, model = make_tokens(1, 180), make(SPARSE_FIRST)
    step, mapped = nnx.jit(extend), nnx.jit(map_layers, static_argnums=0)
    begin, found = 97, {}
    for way in ("closed", "open"):
        cache = engine(tier).prefill(tokens[:, :begin])
        layers, left, found[way] = cache.layers, 0, []
        for n in range(begin, 180):
            if way == "open" and left == 0:
                if n > begin:
                    layers = mapped(close_block, model, layers, jnp.int32(n))
                layers = mapped(open_block, model, layers, jnp.int32(n))
                left = int(left_in_block(jnp.int32(n), ATTENTION))
            left -= 1
            part, at = tokens[:, n : n + 1], jnp.int32(n)
            logits, layers = step(model, layers, part, at, jnp.int32(1))
            found[way].append(np.asarray(logits))
    np.testing.assert_allclose(found["open"], found["closed"], rtol=1e-5, atol=1e-5)


def no_devices(platform):
    raise RuntimeError(f"no {platform}")


def test_refused(monkeypatch):
    for arguments, message in (
        ({"tier": "disk"}, "tier='disk' must be one of device, host, compressed"),
        ({"tier": "host", "batch_size": 2}, "batch_size=2 with tier='host', which takes one"),
        ({"tier": "host", "chunk": 2**15, "capacity": 2**16}, "chunk=32768 with tier='host' must"),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(make(), **{"capacity": 64, **arguments})
    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(ConfigError, match="use JAX_PLATFORMS=cuda,cpu"):
        Engine(make(), 64, tier="host")
    softmax = dataclasses.replace(ATTENTION, fusion="softmax", landmarks="off")
    with pytest.raises(ConfigError, match="averages keys without RoPE"):
        Engine(make(dataclasses.replace(TINY, attention=softmax)), 64, tier="compressed")


def boundaries(level, wide, blocks):
    """First blocks of all slots, in NumPy."""
    starts = np.concatenate((np.arange(wide) * 2, np.arange(2 * wide, -(-blocks // 2**level))))
    return starts << level


@pytest.mark.parametrize("size", [8, 64])
def test_slots_share_the_past_evenly_and_are_only_joined(size):
    blocks = np.arange(1, 3000, dtype=np.int32)
    levels, wides = map(np.asarray, jax.jit(jax.vmap(lambda n: partition(n, size)))(blocks))
    before = np.zeros(0, int)
    for n, level, wide in zip(blocks.tolist(), levels.tolist(), wides.tolist(), strict=True):
        now = boundaries(level, wide, n)
        assert len(now) <= most_slots(n * size)
        spans = np.diff(np.append(now, n))
        assert spans.max() <= 2 * spans[:-1].min(initial=spans.max())  # the last one fills up
        assert set(now.tolist()) <= {*before.tolist(), n - 1}
        before = now
        if n % 500 == 0:
            found = compressed.Partition(level, wide)
            np.testing.assert_array_equal(found.first_block(np.arange(len(now))), now)
            slots = np.searchsorted(now, np.arange(n), side="right") - 1
            np.testing.assert_array_equal(found.slot(np.arange(n)), slots)
    assert len(now) > most_slots(n * size) // 2


def make_keys(tokens, seed=0):
    rng = np.random.default_rng(seed)
    heads, dim = TINY.num_kv_heads, TINY.head_dim

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((1, tokens, heads, *shape)), jnp.float32)

    return KeySide(normal(dim), normal(dim), normal(), normal(ATTENTION.score_dim), normal())


CHUNK, CAPACITY = 40, 520


@functools.partial(jax.jit, static_argnums=0)
def step(kind, remote, keys, queries, length, valid):
    """Appends a chunk, and what its tokens see."""
    features = jnp.zeros((1, touched(CHUNK, 8), TINY.num_kv_heads, ATTENTION.score_dim))
    remote = remote.append(keys, Blocks(features, None), length, valid, ATTENTION, True)
    local_start = remote_end(length + jnp.arange(CHUNK), 0, ATTENTION)
    return remote, kind(remote, queries, length, local_start)


def landmarks_of_device(remote, queries, length, local_start):
    ranges = remote.landmarks(length, queries.q.shape[1], ATTENTION)
    return range_attention(queries.q, *ranges)


def parts_of_compressed(remote, queries, length, local_start):
    return (
        remote._landmarks(queries.q, length, ATTENTION, None),
        remote._slots(queries.q, local_start, ATTENTION, None),
    )


def chunk_of(keys, begin, valid):
    def cut(x):
        part = x[:, begin : begin + valid]
        return jnp.pad(part, ((0, 0), (0, CHUNK - valid)) + ((0, 0),) * (x.ndim - 2),
                       constant_values=7.0)  # fmt: skip

    return jax.tree.map(cut, keys)


@functools.cache
def compressed_run():
    """Both tiers fed with the same keys, in chunks of many sizes."""
    keys = make_keys(CAPACITY)
    rng = np.random.default_rng(1)
    device = DeviceRemote.empty(TINY, 1, CAPACITY, CHUNK)
    small, length, seen = CompressedRemote.empty(TINY, 1, CAPACITY, CHUNK), 0, []
    while length < CAPACITY - CHUNK:
        valid = int(rng.integers(1, CHUNK + 1))
        q = jnp.asarray(rng.standard_normal((1, CHUNK, 4, 8)), jnp.float32)
        operands = chunk_of(keys, length, valid), QuerySide(q, None, None, None)
        numbers = jnp.int32(length), jnp.int32(valid)
        before = small
        device, marks = step(landmarks_of_device, device, *operands, *numbers)
        small, (ours, slots) = step(parts_of_compressed, small, *operands, *numbers)
        seen.append((before, operands, numbers, valid, marks, ours, slots))
        length += valid
    return keys, small, length, seen


def test_landmarks_survive_compression():
    _, _, _, seen = compressed_run()
    some = 0
    for _, _, _, valid, marks, ours, _ in seen:
        for wanted, found in zip(marks, ours, strict=True):
            np.testing.assert_allclose(found[:, :valid], wanted[:, :valid], rtol=1e-5, atol=1e-5)
        some += np.isfinite(np.asarray(marks[1])[:, :valid]).any()
    assert some > len(seen) // 2


def pooled_by_hand(keys, first, last):
    """Averages of tokens [first, last), by the softmax of their logits, in f64."""
    k, v, salience, _, logits = (np.asarray(x[0, first:last], np.float64) for x in keys)
    weights = np.exp(logits) / np.exp(logits).sum(axis=0)
    return (
        (k * weights[..., None]).sum(axis=0),
        (v * weights[..., None]).sum(axis=0),
        (salience * weights).sum(axis=0),
    )


def test_slots_are_averages_over_their_tokens_however_they_came():
    keys, small, length, _ = compressed_run()
    blocks = int(small.pooled[0])
    assert 40 < blocks < length // 8
    level, wide = map(int, partition(jnp.int32(blocks), 8))
    starts = boundaries(level, wide, blocks)
    for slot, (first, last) in enumerate(zip(starts, [*starts[1:], blocks], strict=True)):
        wanted = pooled_by_hand(keys, 8 * first, 8 * last)
        for x, y in zip(small.slots[:3], wanted, strict=True):
            np.testing.assert_allclose(x[0, slot], y, rtol=1e-4, atol=1e-5)
    assert (np.asarray(small.slots.mass)[0, len(starts) :] == -np.inf).all()


def test_what_slots_show_is_the_remote_past():
    keys, _, _, seen = compressed_run()
    before, (_, queries), (length, _), valid, *_, (out, lse) = seen[-1]
    blocks, size = int(remote_end(length, 0, ATTENTION)) // 8, 8
    level, wide = map(int, partition(jnp.int32(blocks), size))
    starts = boundaries(level, wide, blocks).tolist()
    token = valid - 1
    end = int(remote_end(length + token, 0, ATTENTION)) // size
    starts += range(blocks, end + 1)
    pooled = [pooled_by_hand(keys, 8 * a, 8 * b) for a, b in zip(starts, starts[1:], strict=False)]
    for head in range(4):
        q = np.asarray(queries.q[0, token, head], np.float64)
        logits = np.array([q @ k[head // 2] / 8**0.5 + g[head // 2] for k, _, g in pooled])
        weights = np.exp(logits) / np.exp(logits).sum()
        wanted = sum(w * v[head // 2] for w, (_, v, _) in zip(weights, pooled, strict=True))
        np.testing.assert_allclose(out[0, token, head], wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(lse[0, token, head], np.log(np.exp(logits).sum()), rtol=1e-4)


def test_compression_is_strictly_causal():
    _, _, _, seen = compressed_run()
    before, (keys, queries), (length, _), _, _, ours, slots = seen[-2]
    later = 17
    changed = jax.tree.map(lambda x: x.at[:, later:].set(-3.0), keys)
    numbers = length, jnp.int32(CHUNK)
    _, first = step(parts_of_compressed, before, keys, queries, *numbers)
    _, second = step(parts_of_compressed, before, changed, queries, *numbers)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a[:, :later], b[:, :later])


NANO = ModelConfig()


def test_compressed_memory_grows_with_the_root_of_the_past():
    tokens = 2 ** np.arange(16, 23)
    sizes = [Shape(NANO, int(n), 1, 2048).cache_bytes("compressed") for n in tokens]
    exponent = np.polyfit(np.log(tokens), np.log(sizes), 1)[0]
    assert 0 < exponent <= 0.55
    slots = jax.eval_shape(lambda: CompressedRemote.empty(NANO, 1, 2**22, 2048)).slots
    assert slots.k.shape == (1, 2048, 2, 64)


def test_what_does_not_fit_is_told_with_the_tier_that_does():
    gib = 2**30
    shape = Shape(NANO, 2**26, 1, 2048)
    assert 32 < shape.needed("device").device / gib < 40
    assert shape.needed("host").device < 6 * gib < 32 * gib < shape.needed("host").host
    check_fits(shape, "device", Bytes(80 * gib, 20 * gib))
    for there, asked, message in (
        (Bytes(16 * gib, 64 * gib), "device", "takes about 33 GiB of the device's.*'host' would"),
        (Bytes(16 * gib, 20 * gib), "device", "'compressed' would fit, which forgets"),
        (Bytes(80 * gib, 20 * gib), "host", "of the host's memory, which has 20.*'device' would"),
        (Bytes(2**20, 2**21), "device", "no tier would fit: use a smaller length"),
    ):
        with pytest.raises(CacheMemoryError, match=message) as raised:
            check_fits(shape, asked, there)
        assert "\n" not in str(raised.value)
