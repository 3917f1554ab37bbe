"""How often the code of a kernel for TPUs runs: bundles of its schedule, times trip counts.

Bundles are counted as one cycle each: waiting for copies and for the matrix unit is not in it.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_selection.mosaic_tpu import CONFIG
from pallas_kernels.block_selection.mosaic_tpu.configs import GROUP, LANES, STEP
from pallas_kernels.range_attention.mosaic_tpu import plan
from pallas_kernels.tpu_schedule import Region, Schedule
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.landmarks import gather_landmarks
from sparsex_jax.spans import remote_end

Shapes = Sequence[tuple[int, ...]]


def count_cycles(name: str, schedule: Schedule, operands: Shapes, work: Workload) -> float:
    """Cycles of a call of a kernel, on average over the calls that a sequence takes.

    Args:
      name: of the kernel.
      schedule: its bundles.
      operands: their shapes.
      work: the sequence. How far a kernel walks depends on what its queries see; on which blocks
        are selected nothing does, since all pieces of block-sparse attention are taken to be full.

    Raises:
      ValueError: the kernel is not known, or its code is not as it was.
    """
    if name.startswith("range_"):
        return _range_cycles(name, schedule, operands, work)
    if name == "block_selection":
        return _selection_cycles(schedule, operands, work)
    if name.startswith("block_sparse_attention_"):
        return _grid_cycles(schedule)
    raise ValueError(f"how often the code of {name} runs is not known")


def _largest(region: Region, kind: str, count: int) -> list[Region]:
    """The largest regions of a kind directly in one, in the order of the code."""
    inner = [x for x in region.inner if x.kind == kind]
    if len(inner) < count:
        raise ValueError(
            f"a kernel is not as it was: of {count} {kind} regions it has {len(inner)}"
        )
    places = sorted(range(len(inner)), key=lambda n: inner[n].total, reverse=True)
    return [inner[n] for n in sorted(places[:count])]


def _grid_cycles(schedule: Schedule) -> float:
    """With whatever branches pass over, and inner loops once."""
    if (steps := math.prod(schedule.grid)) == 1:
        return schedule.body.total
    (grid,) = _largest(schedule.body, "loop", 1)
    return schedule.body.total + (steps - 1) * grid.total


def _within(schedule: Schedule) -> Region:
    """The largest loop within a step of the grid."""
    step = schedule.body
    if math.prod(schedule.grid) > 1:
        (step,) = _largest(step, "loop", 1)
    loops = Region("kernel", 0, tuple(step.all("loop")))
    return _largest(loops, "loop", 1)[0]


def _walk_cycles(walk: Region, steps: float, whole: float) -> float:
    """Of a loop over tiles, of which some are seen whole: the first of two large branches."""
    seen, masked = _largest(walk, "branch", 2)
    rest = walk.total - seen.total - masked.total
    return steps * rest + whole * seen.total + (steps - whole) * masked.total


def _range_cycles(name: str, schedule: Schedule, operands: Shapes, work: Workload) -> float:
    tokens = next(x[3] for x in operands if len(x) == 4 and x[2] == work.head_dim)
    keys = next(x[2] for x in operands if len(x) == 3 and x[1] == work.head_dim)
    biased = any(len(x) == 3 and x[1:] == (1, keys) for x in operands)
    steps, whole = _count_walks(work, tokens, keys, biased, name == "range_key_gradients")
    walk, tiles = _within(schedule), math.prod(schedule.grid)
    return _grid_cycles(schedule) - tiles * walk.total + _walk_cycles(walk, steps, whole)


@functools.cache
def _count_walks(
    work: Workload, tokens: int, keys: int, landmarks: bool, by_keys: bool
) -> tuple[int, int]:
    """Steps of all walks of a call, and those in which all is seen.

    Args:
      work: the sequence.
      tokens: of the call, a chunk of the sequence that is not the first, or all of it.
      keys: of the call, padded.
      landmarks: whether it is the landmark branch, and not the local one.
      by_keys: whether tiles of keys walk, and not tiles of queries.
    """
    config = work.config
    place = np.arange(tokens)
    if landmarks:
        group, length = config.segment_length, _listed(work)
        starts = (place + (1 - config.window) % group) // group * length
        ends = starts + length
    else:
        place += min(tokens + config.window + config.block_size, work.tokens) - tokens
        starts = np.maximum((place - config.window + 1) // config.block_size, 0) * config.block_size
        ends = place + 1
    q = jax.ShapeDtypeStruct((1, tokens, work.query_heads, work.head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, keys, work.kv_heads, work.head_dim), jnp.bfloat16)
    sizes = plan.Sizes.of(q, k, 1.0)
    start, end = (jnp.asarray(x, jnp.int32)[None] for x in (starts, ends))
    ranges = plan.ranges_of(start, end, sizes)
    made = np.asarray((plan.plan_keys if by_keys else plan.plan_queries)(ranges, sizes))
    first, last, whole_first, whole_last, _ = made[:, 0].T
    whole = np.maximum(np.minimum(last, whole_last) - np.maximum(first, whole_first), 0)
    return work.kv_heads * int((last - first).sum()), work.kv_heads * int(whole.sum())


def _listed(work: Workload) -> int:
    """Landmarks in the list of a query; it may see fewer."""
    config = work.config
    levels = jax.eval_shape(
        lambda k, v, salience: gather_landmarks(k, v, salience, config, sliding=False)[1],
        *(work.spec(name) for name in ("k", "v", "salience")),
    )
    return len(levels) * (config.nodes_per_level + 1) * config.landmarks_per_segment


def _selection_cycles(schedule: Schedule, operands: Shapes, work: Workload) -> float:
    """Tiles of queries; their chunks of blocks; in a chunk, steps of scoring and descents."""
    tokens = next(x[3] for x in operands if len(x) == 4 and x[2] == work.config.score_dim)
    tiles = math.prod(schedule.grid)
    queries = work.kv_heads * tokens // tiles
    share = work.kv_heads * tokens / work.tokens  # of the sequence's tiles
    steps, whole, chunks, looks = (share * x for x in _count_steps(work, queries))

    chunk = _within(schedule)
    loops = [x if x.kind == "loop" else next(x.all("loop")) for x in chunk.inner]
    if len(loops) not in (5, 6):
        raise ValueError(f"block_selection is not as it was: it has {len(loops)} loops")
    scoring, *descents = loops
    cycles = chunks * (chunk.total - sum(loop.total for loop in loops))
    cycles += _walk_cycles(scoring, steps, whole)
    # From the last one back: the best of the blocks, their scores, the best of the groups, their
    # maxima and, if there are more than K, the best of the supergroups.
    for number, loop in enumerate(reversed(descents)):
        if number % 2 == 0:
            cycles += chunks * work.config.top_k * loop.total
        else:
            look = max(loop.all("loop"), key=lambda x: x.total)
            lanes = queries // LANES
            cycles += lanes * (chunks * (loop.total - look.total))
            cycles += lanes * (steps if number == 1 else looks) * look.total
    return _grid_cycles(schedule) - tiles * chunk.total + cycles


@functools.cache
def _count_steps(work: Workload, queries: int) -> tuple[int, int, int, int]:
    """Of all tiles of queries of a sequence, and one KV head.

    Returns:
      Steps of blocks that some query of a tile sees, and those that all see whole; chunks of steps;
      rounds of looking at the groups' maxima, 64 groups each.
    """
    tiles = -(-work.tokens // queries)
    positions = np.minimum(np.arange(tiles * queries), work.tokens - 1)
    limits = remote_end(jnp.asarray(positions, jnp.int32), 0, work.config)
    limit = np.asarray(limits).reshape(tiles, queries) // work.config.block_size
    steps, whole = -(-limit.max(axis=1) // STEP), limit.min(axis=1) // STEP
    most = min(CONFIG.blocks, -(-work.blocks // STEP) * STEP) // STEP  # of a chunk
    full, rest = steps // most, steps % most
    chunks = full + (rest > 0)
    looks = full * -(-most // GROUP) + -(-rest // GROUP)
    return int(steps.sum()), int(whole.sum()), int(chunks.sum()), int(looks.sum())
