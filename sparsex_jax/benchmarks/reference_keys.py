"""Which keys a query row sees, plainly, in NumPy: for the reference of the benchmarks."""

import jax
import numpy as np

from sparsex_jax.benchmarks.cases import Inputs
from sparsex_jax.benchmarks.workload import BEAM, NODE_SIZE, Workload
from sparsex_jax.config import AttentionConfig

CLEAR = 1e-4  # by which a row's K-th best score must beat the next for its choice to be certain


def fetch(x: jax.Array, tokens: np.ndarray, heads: np.ndarray | None = None) -> np.ndarray:
    """f64 [..., rest] of x [1, T, rest], or of x [1, T, H, rest] at pairs of token and head."""
    picked = x[0, tokens] if heads is None else x[0, tokens, heads]
    return np.asarray(picked).astype(np.float64)


def remote_end(tokens: np.ndarray, config: AttentionConfig) -> np.ndarray:
    """a(t) of rows, int [R]."""
    return np.maximum((tokens - config.window + 1) // config.block_size, 0) * config.block_size


def scores(work: Workload, inputs: Inputs, tokens: np.ndarray) -> np.ndarray:
    """s of every block, f64 [R, Hkv, T / S], -inf where a row may not select."""
    u = fetch(inputs["query_features"], tokens)
    c = np.asarray(inputs["block_features"][0]).astype(np.float64)
    found = np.einsum("rhd,nhd->rhn", u, c, optimize=True)
    limit = remote_end(tokens, work.config) // work.config.block_size
    return np.where(np.arange(work.blocks) < limit[:, None, None], found, -np.inf)


def searched(work: Workload, inputs: Inputs, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a search in nodes looks at: blocks, bool [R, Hkv, T / S], and whether that is certain.

    It is, bool [R], where the last node of the beam beats the next by CLEAR.
    """
    u, nodes = fetch(inputs["query_features"], tokens), np.asarray(inputs["nodes"][0])
    found = np.einsum("rhd,nhd->rhn", u, nodes.astype(np.float64), optimize=True)
    limit = remote_end(tokens, work.config) // work.config.block_size
    whole = np.arange(len(nodes)) < (limit // NODE_SIZE)[:, None, None]
    order = np.argsort(-np.where(whole, found, -np.inf), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1)
    cut = np.arange(-(-work.blocks // NODE_SIZE)) == (limit // NODE_SIZE)[:, None, None]
    expanded = np.zeros((*found.shape[:2], cut.shape[-1]), bool)
    expanded[..., : len(nodes)] = (rank < BEAM) & whole
    expanded |= cut & (limit % NODE_SIZE > 0)[:, None, None]
    blocks = np.repeat(expanded, NODE_SIZE, axis=-1)[..., : work.blocks]
    some = np.where(whole, found, -1e30)
    last, following = (np.sum(some * (rank == place), axis=-1) for place in (BEAM - 1, BEAM))
    clear = (limit[:, None] // NODE_SIZE <= BEAM) | (last - following > CLEAR)
    return blocks, clear.all(axis=1)


def best_blocks(found: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Index (-1 for none) and score of the `count` best blocks, [R, Hkv, count]."""
    index = np.argsort(-found, axis=-1, kind="stable")[..., :count]
    best = np.take_along_axis(found, index, axis=-1)
    missing = [(0, 0), (0, 0), (0, count - index.shape[-1])]
    index = np.pad(np.where(np.isneginf(best), -1, index), missing, constant_values=-1)
    return index, np.pad(best, missing, constant_values=-np.inf)


def clear_tokens(work: Workload, inputs: Inputs, tokens: np.ndarray) -> np.ndarray:
    """Those tokens whose choice of blocks no rounding can change."""
    count = work.config.top_k
    if work.blocks <= count:
        return tokens
    best = -np.partition(-scores(work, inputs, tokens), count, axis=-1)[..., : count + 1]
    last, next_best = np.sort(best, axis=-1)[..., 1], np.sort(best, axis=-1)[..., 0]
    clear = np.isneginf(next_best) | (last - np.maximum(next_best, -1e30) > CLEAR)
    return tokens[clear.all(axis=1)]


def landmark_keys(work: Workload, salience: jax.Array, tokens: np.ndarray) -> np.ndarray:
    """Positions of the landmarks that rows see, int [R, Hkv, M], -1 for none."""
    config, host = work.config, np.asarray(salience[0])
    size, r, count = config.segment_length, config.nodes_per_level, config.landmarks_per_segment
    nodes = len(host) // size
    # A segment's own landmarks are all that can become landmarks of a longer one.
    segments = host[: nodes * size].reshape(nodes, size, -1)
    order = np.argsort(-segments, axis=1, kind="stable")[:, :count]
    marks = order + np.arange(nodes)[:, None, None] * size  # [nodes, m, Hkv]

    def node(first: int, last: int, head: int) -> list[int]:
        candidates = np.sort(marks[first:last, :, head], axis=None)
        best = np.argsort(-host[candidates, head], kind="stable")[:count]
        return candidates[best].tolist()

    found = []
    for past in remote_end(tokens, config) // size:
        for head in range(host.shape[1]):
            seen, left, width = [], int(past), 1
            while left > 0:
                taken = min(left, r + (left - r) % 2)
                for i in range(left - taken, left):
                    seen += node(i * width, (i + 1) * width, head)
                left, width = (left - taken) // 2, 2 * width
            found.append(seen)
    most = max(map(len, found))
    padded = [seen + [-1] * (most - len(seen)) for seen in found]
    return np.array(padded, int).reshape(len(tokens), host.shape[1], most)


def local_keys(work: Workload, tokens: np.ndarray) -> np.ndarray:
    """The keys a(t) to t, int [R, Hkv, W + S], -1 for none."""
    config = work.config
    keys = remote_end(tokens, config)[:, None] + np.arange(config.window + config.block_size)
    return for_heads(work, np.where(keys <= tokens[:, None], keys, -1))


def for_heads(work: Workload, keys: np.ndarray) -> np.ndarray:
    """The same keys for each KV head, [R, M] -> [R, Hkv, M]."""
    return np.broadcast_to(keys[:, None], (len(keys), work.kv_heads, keys.shape[1]))


def block_keys(work: Workload, index: np.ndarray) -> np.ndarray:
    """Tokens of blocks, [R, Hkv, K] -> [R, Hkv, K * S]."""
    size = work.config.block_size
    keys = np.where(index >= 0, index * size, -size)[..., None] + np.arange(size)
    return np.where(keys >= 0, keys, -1).reshape(*index.shape[:2], -1)
