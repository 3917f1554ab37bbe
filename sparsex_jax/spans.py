"""Where the local part of a token's past ends and the remote part begins; packed documents.

For the token at position t of a document that starts at d (0 unless documents are packed),
a(t) = max(d, S * floor((t - W + 1) / S)): [a(t), t] is local, [d, a(t)) is remote.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax.config import AttentionConfig


def remote_end(
    positions: jax.Array, document_start: jax.Array | int, config: AttentionConfig
) -> jax.Array:
    """a(t), the first local token, a multiple of the block size.

    Args:
      positions: int32, any shape.
      document_start: first position of each token's document, broadcastable.
      config: window and block size.

    Returns:
      int32 of the broadcast shape.
    """
    size = config.block_size
    return jnp.maximum((positions - config.window + 1) // size * size, document_start)


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """First position of the document that each token belongs to.

    Args:
      segment_ids: int [B, T]; a run of equal numbers is a document.

    Returns:
      int32 [B, T].
    """
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def first_whole_block(document_start: jax.Array, block_size: int) -> jax.Array:
    """Position of the first block that lies wholly in a document, where its remote past begins.

    That is the document's start itself, if it stands at a block boundary as it must. Under `jit`,
    where that cannot be checked, rounding up keeps a block of two documents from both.
    """
    return (document_start + block_size - 1) // block_size * block_size


def pasts(
    positions: jax.Array, document_start: jax.Array | None, config: AttentionConfig
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """What the tokens of a sequence see of their past.

    Args:
      positions: int32 [T].
      document_start: first position of each token's document, int32 [B, T]; None for 0.
      config: window and block size.

    Returns:
      The first local token; the first token of the remote past, None for 0; and the first token
      behind the remote past. int32 [B, T], or [T] without documents.
    """
    if document_start is None:
        local_start = remote_end(positions, 0, config)
        return local_start, None, local_start
    first = first_whole_block(document_start, config.block_size)
    local_start, limit = (remote_end(positions, x, config) for x in (document_start, first))
    return local_start, first, limit


def check_segment_ids(segment_ids: jax.Array, shape: tuple[int, int], block_size: int) -> None:
    """Raises unless documents start at block boundaries (values are seen outside `jit` only).

    Under `jit` a document that starts elsewhere sees nothing of others, but the part before its
    first whole block is attended to within the window only.

    Raises:
      ValueError: the shape is not [B, T], the type no integer, or a document starts elsewhere.
    """
    if segment_ids.shape != shape:
        raise ValueError(
            f"segment_ids has shape {segment_ids.shape} but must be [batch, token]={shape}"
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}: use an integer type")
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    row, begin = np.nonzero(ids[:, 1:] != ids[:, :-1])
    wrong = np.flatnonzero((begin + 1) % block_size)
    if wrong.size:
        raise ValueError(
            f"segment_ids: a document starts at token {begin[wrong[0]] + 1} of row {row[wrong[0]]},"
            f" not at a multiple of block_size={block_size}: pad each document to whole blocks"
        )
