"""Sparse patterns of queries against key blocks, as compressed sparse rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indptr", "indices", "values"),
    meta_fields=("num_columns", "row_capacity", "regular"),
)
@dataclasses.dataclass(frozen=True)
class BlockCSR:
    """A sparse matrix per batch element and KV head: rows are query tokens, columns key blocks.

    Row t owns the entries `indptr[t] <= e < indptr[t + 1]`. The columns of a row are distinct,
    except that any number of entries may be empty.

    Attributes:
      indptr: int32 [B, Hkv, rows + 1], non-decreasing from 0 to at most E.
      indices: int32 [B, Hkv, E], the column of each entry, or -1 for an empty one.
      values: f32 [B, Hkv, E], the score bias of each entry; -inf removes it.
      num_columns: columns of the matrix.
      row_capacity: a bound on the entries of a row, empty ones included.
      regular: whether each row has just so many, so that nobody need look up where they are.
    """

    indptr: jax.Array
    indices: jax.Array
    values: jax.Array
    num_columns: int
    row_capacity: int
    regular: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the matrix: query tokens."""
        return self.indptr.shape[-1] - 1

    @classmethod
    def from_selection(cls, index, score, num_columns: int) -> "BlockCSR":
        """The pattern of K entries a row that `select_blocks` returns.

        Args:
          index: int32 [B, T, Hkv, K], -1 where missing.
          score: f32 [B, T, Hkv, K], the values; None for zeros.
          num_columns: number of blocks that `index` counts.

        Raises:
          ValueError: if the shapes differ or are not of rank 4.
        """
        if index.ndim != 4:
            raise ValueError(
                f"index has shape {index.shape}, but must be [B, T, Hkv, K]: add the missing axes"
            )
        if score is None:
            score = jnp.zeros(index.shape, jnp.float32)
        if score.shape != index.shape:
            raise ValueError(
                f"score has shape {score.shape}, but must have index's {index.shape}:"
                " pass both as select_blocks returned them"
            )
        batch, tokens, heads, count = index.shape
        indptr = jnp.broadcast_to(
            jnp.arange(tokens + 1, dtype=jnp.int32) * count, (batch, heads, tokens + 1)
        )

        def flat(x):
            return jnp.moveaxis(x, 1, 2).reshape(batch, heads, tokens * count)

        indices = flat(index.astype(jnp.int32))
        return cls(indptr, indices, flat(score), num_columns, count, regular=True)

    @classmethod
    def from_mask(cls, mask, values=None, *, batch: int = 1, num_kv_heads: int = 1) -> "BlockCSR":
        """The pattern of a concrete boolean mask, built in NumPy.

        Args:
          mask: bool [B, Hkv, T, Nb], or [T, Nb] for one shared by `batch` and `num_kv_heads`.
          values: f32 of the mask's shape, the score biases; None for zeros.
          batch: B of a mask of rank 2.
          num_kv_heads: Hkv of a mask of rank 2.

        Raises:
          ValueError: if the mask has another rank, or values another shape.
        """
        mask = np.asarray(mask, bool)
        values = np.zeros(mask.shape, np.float32) if values is None else np.asarray(values)
        if values.shape != mask.shape:
            raise ValueError(
                f"values has shape {values.shape}, but must have the mask's {mask.shape}:"
                " give one value per element of the mask"
            )
        if mask.ndim == 2:
            shape = (batch, num_kv_heads, *mask.shape)
            mask, values = np.broadcast_to(mask, shape), np.broadcast_to(values, shape)
        if mask.ndim != 4:
            raise ValueError(
                f"mask has shape {mask.shape}, but must be [B, Hkv, T, Nb] or [T, Nb]:"
                " add the missing axes"
            )
        batch, heads, rows, columns = mask.shape
        row_sizes = mask.sum(axis=-1)
        indptr = np.zeros((batch, heads, rows + 1), np.int32)
        np.cumsum(row_sizes, axis=-1, out=indptr[..., 1:])
        capacity = indptr[..., -1].max(initial=0)
        indices = np.full((batch, heads, capacity), -1, np.int32)
        entry_values = np.zeros((batch, heads, capacity), values.dtype)
        b, h, row, column = np.nonzero(mask)
        # np.nonzero is row-major, so a row's entries follow each other from indptr on.
        first = np.cumsum(indptr[..., -1].ravel()) - indptr[..., -1].ravel()
        place = np.arange(len(b)) - first[b * heads + h]
        indices[b, h, place] = column
        entry_values[b, h, place] = values[b, h, row, column]
        return cls(
            *map(jnp.asarray, (indptr, indices, entry_values)),
            num_columns=columns,
            row_capacity=int(row_sizes.max(initial=0)),
        )

    def entry_rows(self) -> jax.Array:
        """The row of each entry, int32 [B, Hkv, E]; `num_rows` past the last row's end."""
        entries = jnp.arange(self.indices.shape[-1], dtype=jnp.int32)
        flat = self.indptr.reshape(-1, self.num_rows + 1)
        rows = jax.vmap(lambda indptr: jnp.searchsorted(indptr, entries, side="right") - 1)(flat)
        return rows.astype(jnp.int32).reshape(self.indices.shape)

    def transpose(self) -> tuple["BlockCSR", jax.Array]:
        """The column-major view: rows are key blocks, columns query tokens, in ascending order.

        Its row_capacity is E, since any column may own all entries.

        Returns:
          The transposed pattern, and order, int32 [B, Hkv, E]: the place of each of its
          entries in this one. Empty entries stand at the end, in no row.
        """
        rows = self.entry_rows()
        entries = self.indices.shape[-1]
        filled = (self.indices >= 0) & (rows < self.num_rows)
        column = jnp.where(filled, self.indices, self.num_columns)
        order = jnp.argsort(column, axis=-1, stable=True).astype(jnp.int32)
        column, rows, filled, values = (
            jnp.take_along_axis(x, order, axis=-1) for x in (column, rows, filled, self.values)
        )
        boundaries = jnp.arange(self.num_columns + 1, dtype=jnp.int32)
        indptr = jax.vmap(lambda column: jnp.searchsorted(column, boundaries))(
            column.reshape(-1, entries)
        )
        transposed = BlockCSR(
            indptr.astype(jnp.int32).reshape(*self.indptr.shape[:2], self.num_columns + 1),
            jnp.where(filled, rows, -1),
            values,
            num_columns=self.num_rows,
            row_capacity=entries,
        )
        return transposed, order
