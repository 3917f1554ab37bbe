import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax.benchmarks import attention, cases, reference, reference_keys
from sparsex_jax.benchmarks.names import PARTS
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.config import AttentionConfig
from sparsex_jax.landmarks import build_pyramid, leaf_nodes, visible_landmarks
from sparsex_jax.spans import remote_end
from tests.attention_reference import sparse_attention_reference

SMALL = AttentionConfig(
    window=32, block_size=8, top_k=3, segment_length=16, landmarks_per_segment=2,
    nodes_per_level=2, score_dim=8,
)  # fmt: skip
WORK = Workload(256, 4, 2, 16, SMALL)


def find(part, system="sparsex"):
    return next(
        case for case in cases.find_cases((part,), "forward") if case.system.startswith(system)
    )


def measure(case, direction="forward", work=WORK):
    return attention.measure_case(case, work, direction, 0, 0)


@pytest.mark.parametrize("part", PARTS)
def test_parts_equal_the_reference(part):
    directions = ("forward",) if part == "scoring" else ("forward", "forward_backward")
    for direction in directions:
        found = measure(find(part), direction)
        assert found.equal, found.errors
        assert {error.of for error in found.errors} == (
            {"outputs"} if direction == "forward" else {"outputs", "gradients", "norm"}
        )


def test_a_search_that_misses_blocks(monkeypatch):
    for module in (cases, reference_keys):
        monkeypatch.setattr(module, "BEAM", 1)
    found = measure(find("selection_in_nodes"), "forward_backward")
    assert found.equal and 0.2 < found.recall < 1
    monkeypatch.setattr(reference_keys, "BEAM", 2)
    assert not measure(find("selection_in_nodes")).equal
    assert measure(find("selection")).recall is None


@pytest.mark.parametrize(("part", "system"), [("op", "dense"), ("local", "window")])
def test_libraries_equal_the_reference(part, system):
    work = dataclasses.replace(WORK, tokens=1024)  # more than their window
    assert measure(find(part, system), "forward_backward", work).equal


def test_reference_equals_the_tests_own():
    work = Workload(96, 2, 1, 8, SMALL)
    case = find("op")
    inputs = work.make(case.inputs)
    host = {name: np.asarray(x).astype(np.float64) for name, x in inputs.items()}
    expected, _ = sparse_attention_reference(
        host["q"], host["k"], host["v"], SMALL, host["salience"], host["query_features"],
        host["block_features"], host["landmark_gate"], host["dynamic_gate"],
    )  # fmt: skip
    tokens = np.arange(work.tokens)
    rows = reference.Rows(tokens, (expected[0],), (), (), {})
    (error,) = reference.compare(case, work, inputs, rows)
    assert error.value < 1e-6


def change(case, change_outputs):
    """The case with other outputs."""

    def function(work, inputs):
        outputs, indices = case.function(work, inputs)
        return tuple(map(change_outputs, outputs)), indices

    return case._replace(function=function)


@jax.custom_vjp
def twice_the_gradient(x):
    return x


twice_the_gradient.defvjp(lambda x: (x, None), lambda _, bar: (2 * bar,))


def one_key_late(work, inputs):
    positions, start = cases._limits(work)
    out, _ = cases.range_attention(*(inputs[name] for name in "qkv"), start, positions)
    return (out,), ()


def other_blocks(work, inputs):
    index = jnp.where(inputs["index"] > 0, inputs["index"] - 1, inputs["index"])
    return cases._dynamic(work, {**inputs, "index": index})


def second_best(work, inputs):
    (score,), (index,) = cases._selection(work, inputs)
    better = score[..., :1] + 0 * score[..., 1:2]
    return (jnp.concatenate((better, score[..., 1:]), -1),), (index.at[..., 0].set(index[..., 1]),)


FAULTS = {
    "scaled": (change(find("op"), lambda x: x * 1.05), "forward"),
    "not a number": (change(find("op"), lambda x: x.at[0, -1, 0, 0].set(jnp.nan)), "forward"),
    "last row": (change(find("fusion"), lambda x: x.at[0, -1].set(0)), "forward"),
    "key left out": (find("local")._replace(function=one_key_late), "forward"),
    "other blocks": (find("dynamic")._replace(function=other_blocks), "forward"),
    "block twice": (find("selection")._replace(function=second_best), "forward"),
    "scores": (change(find("scoring"), lambda x: x + 1e-3), "forward"),
    "gates": (
        find("op")._replace(
            function=lambda work, inputs: cases._op(
                work, {**inputs, "dynamic_gate": inputs["landmark_gate"]}
            )
        ),
        "forward",
    ),
    "dense gradient": (
        find("op", "dense")._replace(
            function=lambda work, inputs: cases._library(
                None, "xla", work, {**inputs, "k": twice_the_gradient(inputs["k"])}
            )
        ),
        "forward_backward",
    ),
    "selection gradient": (
        find("selection")._replace(
            function=lambda work, inputs: cases._selection(
                work, {**inputs, "block_features": twice_the_gradient(inputs["block_features"])}
            )
        ),
        "forward_backward",
    ),
    "salience gradient": (
        find("op")._replace(
            function=lambda work, inputs: cases._op(
                work, {**inputs, "salience": twice_the_gradient(inputs["salience"])}
            )
        ),
        "forward_backward",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    found = measure(*FAULTS[fault])
    assert not found.equal, found.errors
    assert found.timing is None


def test_gradients_where_there_should_be_none_are_found():
    @jax.custom_vjp
    def leak(x):
        return x

    case = find("fusion")
    rows = reference.choose_tokens(case, WORK, {})
    name = "landmark_out"
    elsewhere = next(t for t in range(WORK.tokens) if t not in rows)
    leak.defvjp(lambda x: (x, None), lambda _, bar: (bar.at[0, elsewhere].add(1e-3),))
    faulty = case._replace(
        function=lambda work, inputs: cases._fusion(work, {**inputs, name: leak(inputs[name])})
    )
    assert not measure(faulty, "forward_backward").equal


def test_counted_keys():
    positions = jnp.arange(WORK.tokens, dtype=jnp.int32)
    start = np.asarray(remote_end(positions, 0, SMALL))
    salience = jnp.zeros((1, WORK.tokens, 1))
    leaves = leaf_nodes(salience, 0, SMALL.segment_length, SMALL.landmarks_per_segment)
    pyramid = build_pyramid(leaves, SMALL, sliding=False)
    segments = jnp.asarray(start // SMALL.segment_length)[None]
    marks = int(np.sum(np.asarray(visible_landmarks(pyramid, segments, None, SMALL)[0]) >= 0))
    attended = {
        "local": int(np.sum(np.arange(WORK.tokens) - start + 1)),
        "landmarks": marks,
        "dynamic": sum(min(int(a) // 8, 3) * 8 for a in start),
    }
    for part, keys in attended.items():
        case = find(part)
        forward = cases.count_operations(case, WORK, "forward")
        assert forward == 4 * 16 * 4 * keys
        assert cases.count_operations(case, WORK, "forward_backward") == 3.5 * forward
    scored = sum(int(a) // 8 for a in start)
    assert cases.count_operations(find("selection"), WORK, "forward") == 2 * 8 * 2 * scored
    dense = cases.count_operations(find("op", "dense"), WORK, "forward")
    assert dense == 4 * 16 * 4 * 256 * 257 / 2
    added = ("selection", "rotary", "local", "landmarks", "dynamic", "fusion")
    for direction in ("forward", "forward_backward"):
        total = sum(cases.count_operations(find(part), WORK, direction) for part in added)
        assert cases.count_operations(find("op"), WORK, direction) == total


def test_scoring_has_no_backward_pass_of_its_own():
    assert not cases.find_cases(("scoring",), "forward_backward")


def test_tokens_with_a_doubtful_choice_are_not_compared():
    inputs = WORK.make(("query_features", "block_features"))
    tokens = np.arange(WORK.tokens)
    few = inputs["block_features"].at[:, 4:].set(inputs["block_features"][:, 4:5])
    kept = reference_keys.clear_tokens(WORK, {**inputs, "block_features": few}, tokens)
    scores = reference_keys.scores(WORK, {**inputs, "block_features": few}, kept)
    best = -np.sort(-scores, axis=-1)
    with np.errstate(invalid="ignore"):
        assert not np.any(best[..., 2] - best[..., 3] == 0)
    assert 0 < len(kept) < len(tokens)
