"""What the two strategies of sequence parallelism send, and which sends less."""

from sparsex_jax.config import AttentionConfig
from sparsex_jax.parallel.dispatch import plan_rounds

INT, FLOAT = 4, 4  # bytes of an index and of an f32


def ring_bytes(parts: int, batch: int, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
    """Bytes that a device sends in a layer, forward and backward, for T tokens of its own.

    Keys and values go P steps each way of differentiation, their gradients, in f32, P steps.
    """
    return parts * batch * tokens * kv_heads * 2 * dim * (2 * itemsize + FLOAT)


def dispatch_bytes(
    parts: int, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, itemsize: int,
    count: int,
) -> int:  # fmt: skip
    """Bytes that a device sends in a layer, forward and backward, where choices are even.

    Queries and results of the planned rounds; keys, values and their gradients, once each.
    """
    rounds = plan_rounds(parts, batch, tokens, heads, dim, count)
    packets = rounds.expected * parts * rounds.capacity * batch * kv_heads
    group = heads // kv_heads
    queries = group * dim * itemsize
    entries = rounds.width * (INT + FLOAT)
    forward = 2 * queries + group * FLOAT + entries
    backward = 3 * queries + 2 * group * FLOAT + entries + rounds.width * FLOAT
    return packets * (forward + backward) + batch * tokens * kv_heads * 4 * dim * itemsize


def cheaper_strategy(parts: int, q, k, config: AttentionConfig) -> str:
    """The strategy that sends fewer bytes, for a device's q [B, T, Hq, D] and k [B, T, Hkv, D]."""
    batch, tokens, heads, dim = q.shape
    kv_heads, itemsize = k.shape[2], k.dtype.itemsize
    ring = ring_bytes(parts, batch, tokens, kv_heads, dim, itemsize)
    dispatch = dispatch_bytes(parts, batch, tokens, heads, kv_heads, dim, itemsize, config.top_k)
    return "ring" if ring <= dispatch else "dispatch"
