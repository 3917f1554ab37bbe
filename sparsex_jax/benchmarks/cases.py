"""What is timed: the attention op, its parts, and the dense attention they stand beside.

Each case says which inputs it takes, what it computes, by which of its inputs it is
differentiated, and how many operations are useful.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.block_selection import select_blocks, select_blocks_in_nodes
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from sparsex_jax.attention import sparse_attention
from sparsex_jax.benchmarks.names import Direction
from sparsex_jax.benchmarks.workload import BEAM, NODE_SIZE, Workload
from sparsex_jax.branches import landmark_branch
from sparsex_jax.fusion import fuse
from sparsex_jax.landmarks import gather_landmarks
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.spans import remote_end

Inputs = dict[str, jax.Array]
WINDOW = 512  # of cuDNN's own window attention: the keys t - 511 to t
BACKWARD = 2.5  # of attention, in units of its forward operations


class Case(NamedTuple):
    """Something to time.

    Attributes:
      system: "sparsex", "dense_cudnn", "window_cudnn" ("..._xla" without cuDNN).
      part: of the attention op; "op" is all of it.
      inputs: names of `Workload.spec`.
      differentiable: those of them by which it is differentiated; none if it has no backward pass.
      function: of a Workload and the inputs; returns (outputs, indices), tuples of arrays: floating
        ones, and others.
      primitives: of `pallas_kernels`, that the function calls.
    """

    system: str
    part: str
    inputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    function: Callable[[Workload, Inputs], tuple[tuple, tuple]]
    primitives: tuple[str, ...]


def _limits(work: Workload) -> tuple[jax.Array, jax.Array]:
    """Positions and a(t), int32 [T]."""
    positions = jnp.arange(work.tokens, dtype=jnp.int32)
    return positions, remote_end(positions, 0, work.config)


def _op(work: Workload, inputs: Inputs):
    out = sparse_attention(**inputs, config=work.config, implementation=work.implementation)
    return (out,), ()


def _select(work: Workload, inputs: Inputs, count: int):
    limit = _limits(work)[1] // work.config.block_size
    index, score = select_blocks(
        inputs["query_features"], inputs["block_features"], limit, count,
        implementation=work.implementation,
    )  # fmt: skip
    return (score,), (index,)


def _scoring(work: Workload, inputs: Inputs):
    return _select(work, inputs, 1)


def _selection(work: Workload, inputs: Inputs):
    return _select(work, inputs, work.config.top_k)


def _selection_in_nodes(work: Workload, inputs: Inputs):
    limit = _limits(work)[1] // work.config.block_size
    index, score = select_blocks_in_nodes(
        inputs["query_features"], inputs["block_features"], inputs["nodes"], limit,
        work.config.top_k, node_size=NODE_SIZE, beam=BEAM, implementation=work.implementation,
    )  # fmt: skip
    return (score,), (index,)


def _rotary(work: Workload, inputs: Inputs):
    positions, _ = _limits(work)
    turned = (apply_rotary(inputs[name], positions, work.config.rope_base) for name in "qk")
    return tuple(turned), ()


def _local(work: Workload, inputs: Inputs):
    positions, start = _limits(work)
    out, _ = range_attention(
        inputs["q"], inputs["k"], inputs["v"], start, positions + 1,
        all_finite=True, implementation=work.implementation,
    )  # fmt: skip
    return (out,), ()


def _landmarks(work: Workload, inputs: Inputs):
    marks, pyramid = gather_landmarks(
        inputs["k"], inputs["v"], inputs["salience"], work.config, sliding=False
    )
    out, _ = landmark_branch(
        inputs["q"], *marks, pyramid, 0, None,
        config=work.config, all_finite=True, implementation=work.implementation,
    )  # fmt: skip
    return (out,), ()


def _dynamic(work: Workload, inputs: Inputs):
    blocks = BlockCSR.from_selection(inputs["index"], inputs["score"], work.blocks)
    out, _ = block_sparse_attention(
        inputs["q"], inputs["k"], inputs["v"], blocks, block_size=work.config.block_size,
        implementation=work.implementation,
    )  # fmt: skip
    return (out,), ()


def _fusion(work: Workload, inputs: Inputs):
    lse = jnp.zeros(inputs["local_out"].shape[:3], jnp.float32)  # a gated sum does not use it
    local, landmarks, dynamic = (
        (inputs[f"{name}_out"], lse) for name in ("local", "landmark", "dynamic")
    )
    gates = inputs["landmark_gate"], inputs["dynamic_gate"]
    out = fuse(local, landmarks, dynamic, *gates, work.config)
    return (out,), ()


def _library(window: tuple[int, int] | None, implementation, work: Workload, inputs: Inputs):
    out = jax.nn.dot_product_attention(
        inputs["q"], inputs["k"], inputs["v"], is_causal=True, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip
    return (out,), ()


def dense_library() -> Literal["cudnn", "xla"]:
    """The implementation of `jax.nn.dot_product_attention` to compare with on this platform."""
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def _all_cases() -> list[Case]:
    qkv, features = ("q", "k", "v"), ("query_features", "block_features")
    gates, outs = ("landmark_gate", "dynamic_gate"), ("local_out", "landmark_out", "dynamic_out")
    every = (*qkv, "salience", *features, *gates)
    library = dense_library()
    dense = functools.partial(_library, None, library)
    # is_causal belongs to it: without, cuDNN's window sees the future (jax-ml/jax#39576).
    window = functools.partial(_library, (WINDOW - 1, 0), library)
    return [
        Case(f"dense_{library}", "op", qkv, qkv, dense, ()),
        Case("sparsex", "op", every, every, _op, dispatch.PRIMITIVES),
        Case("sparsex", "scoring", features, (), _scoring, ("block_selection",)),
        Case("sparsex", "selection", features, features, _selection, ("block_selection",)),
        Case(
            "sparsex", "selection_in_nodes", (*features, "nodes"), features, _selection_in_nodes,
            ("block_selection",),
        ),
        Case("sparsex", "rotary", ("q", "k"), ("q", "k"), _rotary, ()),
        Case(f"window_{library}", "local", qkv, qkv, window, ()),
        Case("sparsex", "local", qkv, qkv, _local, ("range_attention",)),
        Case(
            "sparsex", "landmarks", (*qkv, "salience"), (*qkv, "salience"), _landmarks,
            ("range_attention",),
        ),
        Case(
            "sparsex", "dynamic", (*qkv, "index", "score"), (*qkv, "score"), _dynamic,
            ("block_sparse_attention",),
        ),
        Case("sparsex", "fusion", (*outs, *gates), (*outs, *gates), _fusion, ()),
    ]  # fmt: skip


def find_cases(parts: tuple[str, ...], direction: Direction) -> list[Case]:
    """The cases of some parts, dense attention first; scoring has no backward pass of its own."""
    cases = [case for case in _all_cases() if case.part in parts]
    return [case for case in cases if direction == "forward" or case.differentiable]


def is_dense(case: Case) -> bool:
    """Whether a case is what the others are compared with."""
    return case.system.startswith("dense_")


def depends_on_selection(case: Case) -> bool:
    """Whether the selected blocks may change the time of a case."""
    return not {"query_features", "index"}.isdisjoint(case.inputs)


def implementation_of(case: Case, work: Workload) -> str:
    """By what a case is computed, e.g. "mosaic_gpu, xla": the names given or taken on this device.

    Raises:
      ValueError: `work.implementation` cannot run one of its primitives here.
    """
    if case.system != "sparsex":
        return case.system.rpartition("_")[2]
    if not case.primitives:
        return "xla"
    if work.implementation is not None:
        for primitive in case.primitives:
            dispatch.select(primitive, work.implementation)
        return work.implementation
    taken = {primitive: name for primitive, name, _ in dispatch.explain()}
    return ", ".join(dict.fromkeys(taken[primitive] for primitive in case.primitives))


def program(case: Case, work: Workload, direction: Direction) -> Callable:
    """The function to compile.

    Returns:
      For "forward", of the inputs: (outputs, indices). For "forward_backward", of the inputs and a
      tuple of cotangents, shaped like the outputs: (outputs, indices, gradients by name).
    """
    if direction == "forward":
        return lambda inputs: case.function(work, inputs)

    def both(inputs: Inputs, cotangents: tuple) -> tuple[Any, Any, Any]:
        def compute(differentiable):
            return case.function(work, {**inputs, **differentiable})

        chosen = {name: inputs[name] for name in case.differentiable}
        outputs, pull, indices = jax.vjp(compute, chosen, has_aux=True)
        return outputs, indices, pull(cotangents)[0]

    return both


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Attended keys, summed over the queries of a sequence, for each query head."""

    local: int
    landmarks: int
    dynamic: int
    scored: int  # blocks
    searched: int  # nodes, and blocks of those that are expanded


@functools.lru_cache
def _count_keys(work: Workload) -> _Keys:
    config = work.config
    positions = np.arange(work.tokens, dtype=np.int64)
    start = np.maximum((positions - config.window + 1) // config.block_size, 0) * config.block_size
    blocks = start // config.block_size
    segments, nodes = start // config.segment_length, 0
    while segments.any():
        rest = segments - config.nodes_per_level
        taken = np.minimum(segments, config.nodes_per_level + rest % 2)
        nodes += int(taken.sum())
        segments = (segments - taken) // 2
    return _Keys(
        local=int((positions - start + 1).sum()),
        landmarks=nodes * config.landmarks_per_segment,
        dynamic=int(np.minimum(blocks, config.top_k).sum()) * config.block_size,
        scored=int(blocks.sum()),
        searched=int(
            (blocks // NODE_SIZE + np.minimum(blocks, BEAM * NODE_SIZE + blocks % NODE_SIZE)).sum()
        ),
    )


def count_operations(case: Case, work: Workload, direction: Direction) -> float:
    """Useful floating-point operations; a multiplication and an addition count as two.

    Attention: 4 D for each key that a query head attends to, masked ones left out; the backward
    pass 2.5 times that, as is usual (five products against two: dV, dP, dQ, dK, and q.k again;
    arXiv:2307.08691). Scoring and selection: 2 d_s for each block that a query may select (in
    nodes: for each node and block that it looks at), and 4 d_s for each selected one in the
    backward pass; comparisons are not counted. Rotary and
    fusion: the multiplications and additions of the elements. The op: the sum of its parts.
    """
    if case.part == "op" and not is_dense(case):
        parts = [x for x in _all_cases() if x.system == "sparsex" and x.part not in _NOT_ADDED]
        return sum(count_operations(part, work, direction) for part in parts)
    backward = direction == "forward_backward"
    keys, tokens = _count_keys(work), work.tokens
    if case.part in ("scoring", "selection", "selection_in_nodes"):
        features = work.config.score_dim * work.kv_heads
        chosen = keys.dynamic // work.config.block_size
        looked_at = keys.searched if case.part == "selection_in_nodes" else keys.scored
        return 2.0 * features * (looked_at + 2 * backward * chosen)
    if case.part == "rotary":
        elements = tokens * (work.query_heads + work.kv_heads) * work.head_dim
        return 3.0 * elements * (1 + backward)
    if case.part == "fusion":
        return tokens * work.query_heads * work.head_dim * (4.0 + 6 * backward)
    if is_dense(case):
        attended = tokens * (tokens + 1) // 2
    elif case.system != "sparsex":
        attended = WINDOW * tokens - WINDOW * (WINDOW - 1) // 2
    else:
        attended = getattr(keys, case.part)
    return 4.0 * work.head_dim * work.query_heads * attended * (1 + BACKWARD * backward)


# The op itself, what is within selection, and another way to select.
_NOT_ADDED = ("op", "scoring", "selection_in_nodes")
