"""Attention over a sequence that is split, against the same on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsex_jax.attention import sparse_attention
from sparsex_jax.config import AttentionConfig
from sparsex_jax.parallel import dispatch, sequence
from sparsex_jax.spans import document_starts
from tests.parallel.devices import COUNT, compile_quickly, on_devices
from tests.test_attention import make_inputs

CONFIG = AttentionConfig(
    window=16, block_size=8, top_k=3, segment_length=16, landmarks_per_segment=2,
    nodes_per_level=2, score_dim=4,
)  # fmt: skip
SOFTMAX = dataclasses.replace(CONFIG, fusion="softmax", landmarks="off")
ALL = dataclasses.replace(CONFIG, landmarks="all")
NEAR = dataclasses.replace(CONFIG, near_reach=24, recency=True)
NODES = dataclasses.replace(NEAR, search_node_size=8, search_beam=1)
TOKENS = 32 * COUNT
# Documents that begin and end within devices' parts, at their borders, and one of several parts.
LENGTHS = (40, 24, 8, 88, 32, 64)


def packed():
    return np.repeat([3, 1, 2, 5, 4, 9], LENGTHS)[None].astype(np.int32)


def cotangent(inputs):
    return np.random.default_rng(7).standard_normal(inputs["q"].shape).astype(np.float32)


@functools.cache
def program(config, strategy, documents=False, rounds=None):
    """(inputs, cotangent) -> out and gradients, compiled; strategy None is on one device."""

    def attend(inputs, segment_ids):
        options = {"config": config, "segment_ids": segment_ids, "implementation": "xla"}
        if strategy is None:
            return sparse_attention(**inputs, **options)
        return sequence.sparse_attention(**inputs, **options, strategy=strategy)

    def both(inputs, segment_ids, cotangent):
        out, pull_back = jax.vjp(lambda x: attend(x, segment_ids), inputs)
        return out, pull_back(cotangent)[0]

    if strategy is not None:
        mesh = jax.make_mesh((COUNT,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
        split = P(None, "seq")
        both = jax.shard_map(both, mesh=mesh, in_specs=split, out_specs=split)
    inputs = make_inputs(config, TOKENS)
    ids = packed() if documents else None
    with pytest.MonkeyPatch.context() as patch:
        if rounds is not None:
            patch.setattr(dispatch, "plan_rounds", lambda *_: rounds)
        compiled = compile_quickly(jax.jit(both).lower(inputs, ids, cotangent(inputs)))
    return lambda inputs, cotangent: jax.device_get(compiled(inputs, ids, cotangent))


def assert_same(config, found, expected):
    out, gradients = found
    np.testing.assert_allclose(out, expected[0], rtol=2e-5, atol=2e-6)
    for name, value in expected[1].items():
        scale = np.abs(value).max()
        used = name != "block_mass" and (config.fusion == "sum" or "features" not in name)
        assert (scale > 1e-3) == used, name
        np.testing.assert_allclose(gradients[name], value, rtol=1e-4, atol=3e-6 * scale)


@pytest.mark.parametrize(
    ("config", "strategy", "documents"),
    [
        pytest.param(CONFIG, "ring", True, marks=pytest.mark.long),
        (NODES, "dispatch", True),
        pytest.param(CONFIG, "dispatch", True, marks=pytest.mark.long),
        pytest.param(NEAR, "ring", True, marks=pytest.mark.long),
        pytest.param(SOFTMAX, "ring", False, marks=pytest.mark.long),
        pytest.param(SOFTMAX, "dispatch", False, marks=pytest.mark.long),
        pytest.param(ALL, "auto", False, marks=pytest.mark.long),
    ],
)
@on_devices
def test_equals_one_device(config, strategy, documents):
    inputs = make_inputs(config, TOKENS, seed=1)
    bar = cotangent(inputs)
    expected = program(config, None, documents)(inputs, bar)
    assert_same(config, program(config, strategy, documents)(inputs, bar), expected)


def cut(name, begin, config):
    return begin // config.block_size if name.startswith("block") else begin


@pytest.mark.parametrize("strategy", ["ring", pytest.param("dispatch", marks=pytest.mark.long)])
@on_devices
def test_no_bit_depends_on_later_tokens(strategy):
    """Tokens from a border, or the middle of a block, on: what they choose and are chosen for."""
    inputs = make_inputs(CONFIG, TOKENS, seed=2)
    run = program(CONFIG, strategy, True)
    before = run(inputs, cotangent(inputs))[0]
    others = make_inputs(CONFIG, TOKENS, seed=3)
    for begin in (32, 100, 128, 223):
        mixed = {
            name: np.concatenate(
                (x[:, : cut(name, begin, CONFIG)], 5 * others[name][:, cut(name, begin, CONFIG) :]),
                axis=1,
            )
            for name, x in inputs.items()
        }
        after = run(mixed, cotangent(inputs))[0]
        np.testing.assert_array_equal(after[:, :begin], before[:, :begin])
        assert np.all(np.any(after[:, begin:] != before[:, begin:], axis=(2, 3)))


@pytest.mark.parametrize("strategy", [pytest.param("ring", marks=pytest.mark.long), "dispatch"])
@on_devices
def test_one_block_that_all_choose(strategy):
    """All packets go to one device, in many rounds; nothing is dropped."""
    inputs = make_inputs(SOFTMAX, TOKENS, seed=4)
    inputs["query_features"] = np.abs(inputs["query_features"])
    inputs["block_features"][:, 1] = 100  # in the first device's part
    rounds = dispatch.Rounds(COUNT, 1, 5, 1) if strategy == "dispatch" else None
    bar = cotangent(inputs)
    expected = program(SOFTMAX, None)(inputs, bar)
    run = program(SOFTMAX, strategy, False, rounds)
    assert_same(SOFTMAX, run(inputs, bar), expected)
    inputs["v"][:, 8:16] += 1
    moved = run(inputs, bar)[0] - expected[0]
    assert np.all(np.abs(moved[:, 16 + 16 + 8 :]).max(axis=(2, 3)) > 1e-3)  # beyond the window


@on_devices
def test_rounds_are_as_many_as_needed():
    mesh = jax.make_mesh((COUNT,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))

    def count(owner):
        rounds = dispatch.Rounds(COUNT, 2, 4, 1)
        packets = dispatch._pack(owner, rounds)
        return dispatch._number_of_rounds(packets, rounds)

    rng = np.random.default_rng(0)
    owner = rng.integers(0, COUNT + 1, (2, 6 * COUNT, 2, 5)).astype(np.int32)
    owner[1, 13, 1] = 3
    run = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=P(None, "seq"), out_specs=P()))
    packets = np.zeros((2, COUNT, 2, COUNT), int)
    for b, t, h in np.ndindex(owner.shape[:3]):
        for part in range(COUNT):
            packets[b, t // 6, h, part] += -(-np.sum(owner[b, t, h] == part) // 2)
    assert run(owner) == -(-packets.max() // 4) > 1


@on_devices
def test_document_starts_across_borders():
    mesh = jax.make_mesh((COUNT,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    split = P(None, "seq")
    run = jax.jit(
        jax.shard_map(sequence.document_starts, mesh=mesh, in_specs=split, out_specs=split)
    )
    one, many = np.zeros_like(packed()), np.arange(TOKENS, dtype=np.int32)[None]
    ids = np.concatenate((packed(), one, many, packed()[:, ::-1], many // 32, many // 64), axis=0)
    np.testing.assert_array_equal(run(ids), document_starts(jnp.asarray(ids)))


def test_planned_rounds_hold_even_choices():
    rng = np.random.default_rng(1)
    for parts, count in ((8, 16), (64, 16), (256, 16), (8, 64), (2, 1)):
        rounds = dispatch.plan_rounds(parts, 1, 4096, 16, 128, count)
        owner = rng.integers(0, parts, (4096, count))
        chosen = np.apply_along_axis(np.bincount, 1, owner, minlength=parts)
        packets = np.sum(-(-chosen // rounds.width), axis=0)
        assert packets.max() <= rounds.capacity * rounds.expected < 1.2 * packets.max()
        assert rounds.parts * rounds.capacity * 16 * 128 <= dispatch._MAX_FLOATS


def test_refuses_parts_that_are_too_short():
    mesh = jax.sharding.AbstractMesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))

    def attend(config, tokens, **options):
        inputs = {name: jnp.asarray(x) for name, x in make_inputs(config, 4 * tokens).items()}
        split = P(None, "seq")
        jax.eval_shape(
            jax.shard_map(
                lambda inputs, ids: sequence.sparse_attention(
                    **inputs, config=config, segment_ids=ids
                ),
                mesh=mesh, in_specs=split, out_specs=split,
            ),
            inputs, options.get("segment_ids"),
        )  # fmt: skip

    with pytest.raises(
        ValueError, match="4 devices has 40 tokens: make it a multiple of segment_length=16"
    ):
        attend(CONFIG, 40)
    with pytest.raises(ValueError, match=r"at least window \+ block_size = 24"):
        attend(CONFIG, 16)
    with pytest.raises(ValueError, match="landmarks='all' with segment_ids"):
        attend(ALL, 32, segment_ids=jnp.zeros((1, 128), jnp.int32))
