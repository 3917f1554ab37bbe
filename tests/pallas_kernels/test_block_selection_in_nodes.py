"""select_blocks_in_nodes: every implementation against a search by hand, and what leaks.

Kernels run in interpreters, on a GPU (make test-gpu), or are compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.block_selection import (
    mosaic_gpu,
    mosaic_tpu,
    select_blocks,
    select_blocks_in_nodes,
    two_levels,
    xla,
)
from pallas_kernels.block_selection.mosaic_gpu import rescoring
from pallas_kernels.block_selection.mosaic_gpu.configs import Sizes
from pallas_kernels.block_selection.mosaic_tpu.configs import Config
from tests.pallas_kernels import tpu_interpreter
from tests.pallas_kernels.accuracy import assert_same_bits
from tests.pallas_kernels.hopper_interpreter import HOPPER, cut_small
from tests.pallas_kernels.test_block_selection_mosaic_tpu import quick

# A kernel that hangs holds the main thread, where a signal would not reach it.
pytestmark = pytest.mark.timeout(300, method="thread")

IMPLEMENTATIONS = ("reference", "xla")


def make(seed, tokens, num_blocks, node_size, dim, batch=2, heads=2, levels=2):
    """u, c, nodes, limit, start. In few levels, of 4 numbers: scores are exact, and often tie.

    Bounds are anywhere: in a node, in the same one, at one's end, outside, or in the wrong order.
    """
    rng = np.random.default_rng(seed)
    u, c, nodes = (
        rng.normal(size=(batch, n, heads, dim))
        for n in (tokens, num_blocks, num_blocks // node_size)
    )
    if levels:
        u, c, nodes = (np.round(x * levels) * (np.arange(dim) < 4) for x in (u, c, nodes))
    start = rng.integers(-2, num_blocks // 2 + 2, (batch, tokens))
    limit = start + rng.integers(-1, num_blocks + 9, (batch, tokens))
    for bound in (start, limit):
        bound[:, ::3] = bound[:, ::3] // node_size * node_size
    limit[:, 1::5] = start[:, 1::5] + 5
    return *(jnp.asarray(x, jnp.float32) for x in (u, c, nodes)), limit, start


def by_hand(u, c, nodes, limit, start, count, *, node_size, beam):
    """Python's stable sort, one query at a time."""
    index = np.full((*u.shape[:3], count), -1, np.int32)
    score = np.full((*u.shape[:3], count), -np.inf, np.float32)
    u, c, nodes = (np.asarray(x, np.float64) for x in (u, c, nodes))
    for b, t, h in np.ndindex(*u.shape[:3]):
        low, high = max(start[b, t], 0), min(limit[b, t], c.shape[1])
        members = [range(n * node_size, (n + 1) * node_size) for n in range(-(-high // node_size))]
        inside = [[low <= x < high for x in each] for each in members]
        whole = [n for n, x in enumerate(inside) if all(x)]
        cut = [n for n, x in enumerate(inside) if any(x) and not all(x)]
        assert len(cut) <= 2
        best = sorted(whole, key=lambda n, b=b, t=t, h=h: -(u[b, t, h] @ nodes[b, n, h]))[:beam]
        blocks = [x for n in sorted(best + cut) for x in members[n] if low <= x < high]
        scores = {x: np.float32(u[b, t, h] @ c[b, x, h]) for x in blocks}
        found = sorted(blocks, key=lambda x, scores=scores: -scores[x])[:count]
        index[b, t, h, : len(found)] = found
        score[b, t, h, : len(found)] = [scores[x] for x in found]
    return index, score


def poison(c, nodes, limit, start, node_size):
    """NaN in all blocks that no query may select, and in all nodes that no query may score."""
    block, low, high = np.arange(c.shape[1]), start[..., None], limit[..., None]
    allowed = np.any((low <= block) & (block < high), axis=1)
    first = np.arange(nodes.shape[1]) * node_size
    whole = np.any((low <= first) & (first + node_size <= high), axis=1)
    return (jnp.where(x[:, :, None, None], y, jnp.nan) for x, y in ((allowed, c), (whole, nodes)))


def bounded(limit, start, low, high):
    """The bounds, so that no block outside of [low, high) is allowed."""
    return np.minimum(limit, high), np.maximum(start, low)


def run(implementation, u, c, nodes, limit, start, count, **cut):
    select = functools.partial(
        select_blocks_in_nodes, count=count, implementation=implementation, **cut
    )
    return quick(lambda *x: select(*x[:4], start=x[4]))(u, c, nodes, limit, start)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(xla, "_FLOATS_PER_CHUNK", 1)
    monkeypatch.setattr(xla, "_MIN_ROWS", 5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_blocks", "node_size", "beam", "count"),
    [(0, 8, 1, 3), (5, 8, 1, 3), (59, 8, 2, 4), (64, 16, 1, 50), (150, 32, 2, 6)],
)
def test_selection(implementation, num_blocks, node_size, beam, count, small_chunks):
    operands = make(num_blocks, 33, num_blocks, node_size, 4)
    cut = {"node_size": node_size, "beam": beam}
    index, score = run(implementation, *operands, count, **cut)
    expected_index, expected_score = by_hand(*operands, count, **cut)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(score, expected_score)
    assert (index.dtype, score.dtype) == (jnp.int32, jnp.float32)


def test_expanded_nodes():
    """The chosen, and those that a bound cuts, in order and once each."""
    rows = [  # of nodes of 8: start, limit, chosen, expanded
        (0, 40, (4, -1, 2), (2, 4, -1, -1, -1)),
        (3, 45, (4, 1, 2), (0, 1, 2, 4, 5)),
        (8, 45, (4, 1, -1), (1, 4, 5, -1, -1)),
        (9, 14, (-1, -1, -1), (1, -1, -1, -1, -1)),
        (9, 9, (-1, -1, -1), (-1, -1, -1, -1, -1)),
        (29, 9, (-1, -1, -1), (-1, -1, -1, -1, -1)),
        (9, -3, (-1, -1, -1), (-1, -1, -1, -1, -1)),
    ]
    start, limit, chosen, expected = (np.array(x)[None] for x in zip(*rows, strict=True))
    found = two_levels.expand(jnp.asarray(chosen)[:, :, None], limit, start, 8)
    np.testing.assert_array_equal(found[:, :, 0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_beam_of_all_nodes_selects_what_flat_scoring_does(implementation):
    u, c, nodes, limit, start = make(1, 40, 75, 8, 4)
    found = run(implementation, u, c, nodes, limit, start, 9, node_size=8, beam=9)
    expected = select_blocks(u, c, limit, 9, start=start, implementation="xla")
    assert_same_bits(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_zero_ties_with_zero(implementation):
    u = jnp.ones((1, 1, 1, 1))
    c, nodes = (jnp.tile(jnp.asarray([-1, -0.0, 0, -0.0]), n)[None, :, None, None] for n in (8, 1))
    limit, start = np.array([[32]]), np.array([[0]])
    index, _ = run(implementation, u, c, nodes, limit, start, 3, node_size=8, beam=1)
    np.testing.assert_array_equal(index[0, 0, 0], [9, 10, 11])  # of node 1


def test_no_queries_and_no_blocks_wanted():
    for tokens, count in ((0, 3), (3, 0)):
        u, c, nodes, limit, _ = make(0, tokens, 20, 8, 4)
        found = select_blocks_in_nodes(u, c, nodes, limit, count, node_size=8, beam=1)
        assert [x.shape for x in found] == [(2, tokens, 2, count)] * 2


def gradients(implementation, u, c, nodes, limit, start, bar, *, node_size, beam):
    """(index, score) and the gradients of u, c and nodes, for the cotangent `bar` of the score."""

    def score(u, c, nodes):
        index, score = select_blocks_in_nodes(
            u, c, nodes, limit, bar.shape[3], node_size=node_size, beam=beam, start=start,
            implementation=implementation,
        )  # fmt: skip
        return score, index

    score, vjp, index = jax.vjp(score, u, c, nodes, has_aux=True)
    return (index, score), vjp(bar)


def expected_gradients(u, c, index, bar):
    """Of the products with all blocks, where the selected ones have a cotangent."""
    dense = np.zeros((*u.shape[:3], c.shape[1]), np.float32)
    for place in zip(*np.nonzero(index >= 0), strict=True):
        dense[*place[:3], index[place]] = bar[place]
    u, c = (np.nan_to_num(np.asarray(x, np.float32)) for x in (u, c))
    return np.einsum("bthn,bnhd->bthd", dense, c), np.einsum("bthn,bthd->bnhd", dense, u)


def assert_right(implementation, operands, count, dtype=jnp.float32, jit=quick, **cut):
    """Selection and gradients, by hand, with NaN in all blocks and nodes that nobody may use."""
    u, c, nodes, limit, start = operands
    c_poisoned, nodes_poisoned = poison(c, nodes, limit, start, cut["node_size"])
    assert np.any(np.isnan(c_poisoned)) and np.any(np.isnan(nodes_poisoned))
    bar = np.random.default_rng(9).normal(size=(*u.shape[:3], count)).astype(np.float32)
    arrays = [x.astype(dtype) for x in (u, c_poisoned, nodes_poisoned)]
    run = jit(functools.partial(gradients, implementation, **cut))
    (index, score), (*bars, nodes_bar) = run(*arrays, jnp.asarray(limit), jnp.asarray(start), bar)
    expected_index, expected_score = by_hand(*operands, count, **cut)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(score, expected_score)
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
    for x, y in zip(bars, expected_gradients(u, c, expected_index, bar), strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), y, tolerance, tolerance)
    assert not np.any(np.asarray(nodes_bar))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_and_poison(implementation, small_chunks):
    u, c, nodes, limit, start = make(2, 23, 75, 8, 4)
    assert_right(
        implementation, (u, c, nodes, *bounded(limit, start, 3, 60)), 6, node_size=8, beam=2
    )


def test_transformations():
    """vmap, bfloat16 and shard_map; under checkpoint, what is saved is not searched for again."""
    u, c, nodes, limit, start = make(3, 12, 40, 8, 4)
    saved = jax.checkpoint_policies.save_only_these_names("block_selection")

    @functools.partial(jax.checkpoint, policy=saved)
    def total(u, c, nodes, limit, start):
        index, score = select_blocks_in_nodes(
            u, c, nodes, limit, 5, node_size=8, beam=1, start=start, implementation="xla"
        )
        return jnp.sum(jnp.where(index >= 0, score, 0) ** 2)

    gradients = jax.grad(total, (0, 1))
    operands = u, c, nodes, jnp.asarray(limit), jnp.asarray(start)
    assert str(jax.make_jaxpr(gradients)(*operands)).count("top_k[") == 2
    expected = quick(gradients)(*operands)
    arrays = [x.astype(jnp.bfloat16) for x in operands[:3]]
    rows = P(None, None, "device")
    mapped = jax.shard_map(
        jax.vmap(gradients), in_specs=(rows, P(), P(), rows, rows), out_specs=(rows, P())
    )
    with jax.set_mesh(Mesh(jax.devices()[:1], "device")):
        found = quick(mapped)(*(x[:, None] for x in (*arrays, *operands[3:])))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        x, largest = np.asarray(x[:, 0], np.float32), np.abs(y).max()
        np.testing.assert_allclose(x, y, 2e-2, 2e-2 * largest)


def test_later_queries_do_not_matter_bit_for_bit(small_chunks):
    u, c, nodes, limit, _ = make(4, 23, 75, 8, 16, levels=None)

    @jax.jit
    def select(u, limit):
        return select_blocks_in_nodes(
            u, c, nodes, limit, 4, node_size=8, beam=2, implementation="xla"
        )

    before = select(u, jnp.asarray(limit))
    for t in (1, 6, 22):
        moved = limit.copy()
        moved[:, t:] = 75
        after = select(u.at[:, t:].multiply(-3), jnp.asarray(moved))
        assert_same_bits([x[:, :t] for x in before], [x[:, :t] for x in after])


def test_memory_is_linear():
    def temporary(tokens):
        blocks = tokens // 64
        u, c, nodes = (
            jax.ShapeDtypeStruct((1, n, 1, 64), jnp.bfloat16)
            for n in (tokens, blocks, blocks // 64)
        )
        select = functools.partial(
            select_blocks_in_nodes, count=16, node_size=64, beam=14, implementation="xla"
        )
        lowered = jax.jit(select).lower(u, c, nodes, jax.ShapeDtypeStruct((tokens,), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = map(temporary, (2**16, 2**17))
    assert large <= 2.1 * small


class TestHopper:
    """Interpreted, or on a GPU: two thread blocks and two stages, so that all take turns."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        cut_small(monkeypatch, mosaic_gpu, programs=2)

    @pytest.mark.parametrize(
        ("batch", "tokens", "node_size", "beam", "count"),
        [
            (2, 3, 16, 4, 10),
            pytest.param(2, 70, 16, 3, 10, marks=pytest.mark.long),
            pytest.param(1, 140, 32, 3, 20, marks=pytest.mark.long),
        ],
    )
    def test_selection_and_gradients(self, hopper, batch, tokens, node_size, beam, count):
        u, c, nodes, limit, start = make(5, tokens, 300, node_size, 64, batch, heads=batch)
        operands = u, c, nodes, *bounded(limit, start, 5, 290)
        cut = {"node_size": node_size, "beam": beam}
        assert_right("mosaic_gpu", operands, count, jnp.bfloat16, jax.jit, **cut)

    def test_blocks_of_nodes(self, hopper, monkeypatch):
        """Of nodes that XLA finds, which is quicker than the interpreter; scored in two parts."""
        levels = two_levels.Levels(xla.select_blocks, mosaic_gpu.best_of_nodes)
        select = functools.partial(two_levels.select, levels)
        monkeypatch.setattr(mosaic_gpu, "select_blocks_in_nodes", select)
        u, c, nodes, limit, start = make(5, 70, 295, 16, 64, batch=1, heads=1)
        operands = u, c, nodes, *bounded(limit, start, 5, 290)
        assert_right("mosaic_gpu", operands, 20, jnp.bfloat16, jax.jit, node_size=16, beam=3)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 4])
def test_many_on_a_gpu(tokens):
    """As plain JAX in f32; scores are exact, and often tie."""
    u, c, nodes, limit, start = make(6, tokens, 16384, 64, 64)
    cut = {"node_size": 64, "beam": 14, "start": start}
    half = [x.astype(jnp.bfloat16) for x in (u, c, nodes)]
    found, expected = (
        jax.jit(
            functools.partial(
                select_blocks_in_nodes, count=16, implementation=implementation, **cut
            )
        )(*arrays, limit)
        for implementation, arrays in (("mosaic_gpu", half), ("xla", (u, c, nodes)))
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_on_a_tpu(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "CONFIG", Config(128, 512))
    u, c, nodes, limit, start = make(7, 70, 300, 8, 64, heads=1)
    operands = u, c, nodes, *bounded(limit, start, 5, 290)
    with tpu_interpreter.interpret():
        assert_right("mosaic_tpu", operands, 10, jnp.bfloat16, node_size=8, beam=4)


def abstract(tokens, blocks, node_size, dim):
    """u, c, nodes, limit."""
    u, c, nodes = (
        jax.ShapeDtypeStruct((1, n, 2, dim), jnp.bfloat16)
        for n in (tokens, blocks, blocks // node_size)
    )
    return u, c, nodes, jax.ShapeDtypeStruct((tokens,), jnp.int32)


@pytest.mark.parametrize(
    ("dim", "count", "groups"),
    [
        (64, 16, 128),
        (128, 16, 64),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((64, 16, 64), (128, 16, 128), (64, 64, 16), (64, 64, 208), (128, 64, 112))
        ),
    ],
)
def test_rescoring_keeps_to_registers(dim, count, groups):
    u, c, _, _ = abstract(2**14, 2**14, 64, dim)
    group = jax.ShapeDtypeStruct((*u.shape[:3], groups), jnp.int32)
    bound = jax.ShapeDtypeStruct(u.shape[:2], jnp.int32)
    sizes = Sizes(*u.shape, count, groups)

    def score_groups(*operands):
        return rescoring.score_groups(*operands, sizes=sizes, config=mosaic_gpu.config_for(dim))

    (kernel,) = compile_for("h200", score_groups, u, c, group, bound, bound).kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "dim", "kernels"), [("h200", 64, 3), ("h200", 128, 3), ("v5e:2x4", 64, 1)]
)
def test_compiles_on_8_devices(target, dim, kernels):
    """What is saved by name is not searched for again; gradients of what all share are added."""
    saved = jax.checkpoint_policies.save_only_these_names("block_selection")

    def gradients(u, c, nodes, limit):
        @functools.partial(jax.checkpoint, policy=saved)
        def total(u, c):
            index, score = select_blocks_in_nodes(u, c, nodes, limit, 16, node_size=64, beam=14)
            return jnp.sum(jnp.where(index >= 0, score, 0) ** 2)

        return jax.grad(total, argnums=(0, 1))(u, c)

    def sharded(*operands):
        queries = P(None, "device")
        specs = queries, P(), P(), P("device")
        return jax.shard_map(gradients, in_specs=specs, out_specs=(queries, P()))(*operands)

    compilation = compile_for(target, sharded, *abstract(2**14, 2**12, 64, dim), devices=8)
    assert len(compilation.kernels) == kernels
    for kernel in compilation.kernels if target == "h200" else ():
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0
    assert "all-reduce" in compilation.executable.as_text()


def test_bad_inputs():
    u, c, nodes, limit, _ = make(0, 13, 20, 8, 4)
    select = functools.partial(select_blocks_in_nodes, limit=limit, count=3, node_size=8, beam=1)
    for error, match, call in (
        (ValueError, "u has shape", lambda: select(u[0], c, nodes)),
        (ValueError, "nodes has shape", lambda: select(u, c, nodes[:, :, :1])),
        (ValueError, "nodes has 3 nodes, but the 20 blocks", lambda: select(u, c, c[:, :3])),
        (TypeError, "nodes is bfloat16", lambda: select(u, c, nodes.astype(jnp.bfloat16))),
        (ValueError, "node_size=12 must be a multiple", lambda: select(u, c, nodes, node_size=12)),
        (ValueError, "node_size=0 must be a multiple", lambda: select(u, c, nodes, node_size=0)),
        (ValueError, "node_size=72 must be .* up to 64", lambda: select(u, c, c, node_size=72)),
        (ValueError, "beam=0 must be at least 1", lambda: select(u, c, nodes, beam=0)),
        (ValueError, "'mosaic' is not", lambda: select(u, c, nodes, implementation="mosaic")),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    ("device", "name", "dim", "beam", "problem"),
    [
        (tpu_interpreter.TPU, "mosaic_tpu", 64, 65, "expands up to 64 nodes, not 65"),
        (HOPPER, "mosaic_gpu", 64, 65, "expands up to 64 nodes, not 65"),
        (HOPPER, "mosaic_gpu", 64, 31, "expands up to 30 nodes of 64 blocks, not 31"),
        (HOPPER, "mosaic_gpu", 128, 19, "expands up to 18 nodes of 64 blocks, not 19"),
    ],
)
def test_others_are_refused(device, name, dim, beam, problem):
    operands = abstract(64, 2**13, 64, dim)

    def choose(beam):
        select = functools.partial(
            select_blocks_in_nodes, count=16, node_size=64, beam=beam, implementation=name
        )
        jax.eval_shape(select, *operands)

    with dispatch.targeting(device):
        with pytest.raises(ValueError, match=problem):
            choose(beam)
        if device is HOPPER and beam < 64:  # the next smaller one fits
            choose(beam - 1)
