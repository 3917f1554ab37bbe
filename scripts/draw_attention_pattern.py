"""Draws which keys a query attends to, from the library's own functions.

    python scripts/draw_attention_pattern.py [PATH]

Writes docs/attention_pattern.png unless another PATH is given. Small sizes, random features.
"""

import pathlib
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np
import tyro

from pallas_kernels.block_selection import select_blocks
from sparsex_jax.config import AttentionConfig
from sparsex_jax.landmarks import build_pyramid, leaf_nodes, visible_landmarks
from sparsex_jax.scoring import rms_normalize
from sparsex_jax.spans import remote_end

PATH = pathlib.Path(__file__).parents[1] / "docs" / "attention_pattern.png"
TOKENS = 512
CONFIG = AttentionConfig(
    window=48, block_size=8, top_k=5, segment_length=16, landmarks_per_segment=2,
    nodes_per_level=2, score_dim=16,
)  # fmt: skip
BRANCHES = (("not attended", "#f4f1ea"), ("local window", "#1f5a92"),
            ("top-k blocks", "#e2902f"), ("landmarks", "#b3213c"))  # fmt: skip


def attention_pattern(config: AttentionConfig, tokens: int, seed: int = 0) -> np.ndarray:
    """The branch by which each query attends to each key, int [T, N].

    Args:
      config: window, blocks, landmarks.
      tokens: T = N.
      seed: of random salience and features.

    Returns:
      Indices into BRANCHES; a landmark within a selected block counts as a landmark.
    """
    salience_key, query_key, block_key = jax.random.split(jax.random.key(seed), 3)
    positions = jnp.arange(tokens, dtype=jnp.int32)
    local_start = remote_end(positions, 0, config)

    salience = jax.random.normal(salience_key, (1, tokens, 1))
    leaves = leaf_nodes(salience, 0, config.segment_length, config.landmarks_per_segment)
    pyramid = build_pyramid(leaves, config, sliding=False)
    segments = (local_start // config.segment_length)[None]
    landmarks = np.asarray(visible_landmarks(pyramid, segments, None, config)[0])[0, 0]

    # Neighbouring queries want similar things, as in a trained model.
    steps = jax.random.normal(query_key, (1, tokens, 1, config.score_dim))
    queries = rms_normalize(jnp.cumsum(steps, axis=1))
    blocks = jax.random.normal(block_key, (1, tokens // config.block_size, 1, config.score_dim))
    limit = local_start // config.block_size
    index, _ = select_blocks(queries, rms_normalize(blocks), limit, config.top_k)
    selected = np.asarray(index)[0, :, 0]

    pattern = np.zeros((tokens, tokens), int)
    for t in range(tokens):
        pattern[t, int(local_start[t]) : t + 1] = 1
        for block in selected[t][selected[t] >= 0]:
            pattern[t, block * config.block_size : (block + 1) * config.block_size] = 2
        pattern[t, landmarks[t][landmarks[t] >= 0]] = 3
    return pattern


def draw(path: pathlib.Path) -> None:
    """Writes the picture."""
    names, colors = zip(*BRANCHES, strict=True)
    pattern = attention_pattern(CONFIG, TOKENS)
    figure = matplotlib.figure.Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        pattern, cmap=matplotlib.colors.ListedColormap(colors), vmin=0, vmax=len(colors) - 1,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(
        f"{TOKENS} tokens, one head: window {CONFIG.window}, {CONFIG.top_k} blocks of"
        f" {CONFIG.block_size},\n{CONFIG.landmarks_per_segment} landmarks a node,"
        f" segments of {CONFIG.segment_length}; random features",
        fontsize=10,
    )
    patches = [
        matplotlib.patches.Patch(color=color, label=name)
        for name, color in zip(names[1:], colors[1:], strict=True)
    ]
    axes.legend(handles=patches, loc="upper right")
    figure.savefig(path, dpi=160)


def main(path: Annotated[pathlib.Path, tyro.conf.Positional] = PATH) -> None:
    """Draws the picture.

    Args:
      path: of the PNG file.
    """
    draw(path)
    print(path)


if __name__ == "__main__":
    tyro.cli(main)
