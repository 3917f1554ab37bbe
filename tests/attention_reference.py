"""Sparse-X attention written token by token in NumPy, f64, straight from docs/math.md."""

import numpy as np


def rotate(x, position, base):
    """RoPE of one head vector, with exact angles."""
    half = x.shape[-1] // 2
    steps = np.round(base ** (-np.arange(half) / half) / (2 * np.pi) * 2**32).astype(np.uint64)
    angle = (steps * np.uint64(position) % np.uint64(2**32)).astype(np.float64) * 2 * np.pi / 2**32
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((left * cos - right * sin, right * cos + left * sin), axis=-1)


def softmax(logits, values):
    """(out, lse) of one query."""
    if not len(logits):
        return np.zeros(values.shape[-1]), -np.inf
    top = np.max(logits)
    weights = np.exp(logits - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum())


def segment_landmarks(salience, begin, end, count):
    """Positions of the `count` most salient tokens in [begin, end), ties to the earlier."""
    order = sorted(range(begin, end), key=lambda j: (-salience[j], j))
    return order[:count]


def landmark_positions(salience, first, past_end, config):
    """Landmarks that a query sees whose remote past is [first, past_end)."""
    size, r = config.segment_length, config.nodes_per_level
    segments, level, found = (past_end - first) // size, 0, []
    if config.landmarks == "all":
        for i in range(segments):
            begin = first + i * size
            found += segment_landmarks(salience, begin, begin + size, config.landmarks_per_segment)
        return found
    while segments > 0:
        taken = min(segments, r + (segments - r) % 2)
        width = size << level
        for i in range(segments - taken, segments):
            begin = first + i * width
            found += segment_landmarks(salience, begin, begin + width, config.landmarks_per_segment)
        segments, level = (segments - taken) // 2, level + 1
    return found


def searched_blocks(u, c, mass, first, end, config):
    """Blocks from `first` to `end` that a query's search looks at; c [N, d_s] and mass [N]."""
    size = config.search_node_size
    if not size or first == end:
        return range(first, end)
    scores = {}
    for node in range(-(-first // size), end // size):
        own = slice(node * size, (node + 1) * size)
        weights = np.exp(mass[own] - np.max(mass[own]))
        pooled = weights @ c[own] / weights.sum()
        scores[node] = u @ pooled / np.sqrt(np.mean(pooled**2) + 1e-6)
    nodes = set(sorted(scores, key=lambda n: (-scores[n], n))[: config.search_beam])
    nodes |= {bound // size for bound in (first, end) if bound % size}  # those that are cut
    return [n for n in range(first, end) if n // size in nodes]


def sparse_attention_reference(
    q, k, v, config, salience=None, u=None, c=None, gate_g=None, gate_d=None, segment_ids=None,
    mass=None, recency=None,
):  # fmt: skip
    """(out [B, T, Hq, D], selected blocks {(b, t, kv head): [block, ...]})."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    out, selected, s = np.zeros(q.shape), {}, config.block_size
    for b in range(batch):
        for t in range(tokens):
            first = t
            while first and (segment_ids is None or segment_ids[b][first - 1] == segment_ids[b][t]):
                first -= 1
            a = max(first, s * ((t - config.window + 1) // s))
            for head in range(heads):
                h = head // group
                turned = rotate(q[b, t, head], t, config.rope_base)
                keys = np.stack([rotate(k[b, j, h], j, config.rope_base) for j in range(tokens)])
                scale = dim**-0.5
                near = np.arange(a, t + 1)
                local, lse = softmax(keys[near] @ turned * scale, v[b, near, h])
                far, bias = [], []
                if config.top_k:
                    of_query, of_blocks = (
                        np.asarray(x, np.float64) for x in (u[b, t, h], c[b, :, h])
                    )
                    masses = None if mass is None else np.asarray(mass[b, :, h], np.float64)
                    searched = searched_blocks(
                        of_query, of_blocks, masses, first // s, a // s, config
                    )
                    scores = {n: float(of_query @ of_blocks[n]) for n in searched}
                    order = sorted(scores, key=lambda n: (-scores[n], n))
                    best = order[: config.top_k]
                    if config.near_reach:
                        middle = max(a - config.near_reach, s * ((first + a) // (2 * s))) // s
                        near = [n for n in order if n >= middle][: config.top_k // 2]
                        far = [n for n in order if n < middle]
                        best = near + far[: config.top_k - config.top_k // 2]
                    selected[b, t, h] = best
                    far = [j for n in best for j in range(n * s, (n + 1) * s)]
                    if recency is not None:
                        for n in best:
                            distance = a - (n + 1) * s
                            scores[n] -= recency[b, t, h] * np.log2(1 + distance / config.window)
                    bias = [scores[n] for n in best for _ in range(s)]
                if config.fusion == "softmax":
                    everything = np.concatenate((near, far)).astype(int)
                    out[b, t, head], _ = softmax(
                        keys[everything] @ turned * scale, v[b, everything, h]
                    )
                    continue
                total = local
                if far:
                    part, _ = softmax(k[b, far, h] @ q[b, t, head] * scale + bias, v[b, far, h])
                    total = total + part * (1 if gate_d is None else gate_d[b, t, head])
                if config.landmarks != "off":
                    marks = landmark_positions(salience[b, :, h], first, a, config)
                    if marks:
                        logits = k[b, marks, h] @ q[b, t, head] * scale + salience[b, marks, h]
                        part, _ = softmax(logits, v[b, marks, h])
                        total = total + part * (1 if gate_g is None else gate_g[b, t, head])
                out[b, t, head] = total
    return out, selected
