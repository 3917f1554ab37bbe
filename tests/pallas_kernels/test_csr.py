"""BlockCSR: its constructors and its transpose, against dense masks in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.csr import BlockCSR


def to_dense(blocks):
    """[B, Hkv, rows, columns] of values, NaN where there is no entry."""
    indptr, indices, values = map(np.asarray, (blocks.indptr, blocks.indices, blocks.values))
    batch, heads = indptr.shape[:2]
    dense = np.full((batch, heads, blocks.num_rows, blocks.num_columns), np.nan, values.dtype)
    for b, h, row in np.ndindex(batch, heads, blocks.num_rows):
        start, end = indptr[b, h, row : row + 2]
        assert end - start <= blocks.row_capacity
        for entry in range(start, end):
            if indices[b, h, entry] >= 0:
                dense[b, h, row, indices[b, h, entry]] = values[b, h, entry]
    return dense


def random_mask(rng, shape=(2, 3, 7, 5)):
    mask = rng.random(shape) < rng.random((*shape[:3], 1))
    return mask, np.where(mask, rng.normal(size=shape), np.nan).astype(np.float32)


def test_mask_round_trip():
    mask, values = random_mask(np.random.default_rng(0))
    blocks = BlockCSR.from_mask(mask, values)
    np.testing.assert_array_equal(to_dense(blocks), values)
    assert blocks.row_capacity == mask.sum(-1).max()
    assert blocks.indices.shape[-1] == mask.sum((-1, -2)).max()


def test_mask_of_rank_two_is_shared():
    mask = np.tri(4, 3, dtype=bool)
    blocks = BlockCSR.from_mask(mask, batch=2, num_kv_heads=3)
    np.testing.assert_array_equal(~np.isnan(to_dense(blocks)), np.broadcast_to(mask, (2, 3, 4, 3)))


@pytest.mark.parametrize("shape", [(1, 1, 0, 3), (1, 2, 3, 0), (2, 1, 3, 4)])
def test_empty_mask(shape):
    blocks = BlockCSR.from_mask(np.zeros(shape, bool))
    assert blocks.row_capacity == 0
    assert blocks.indices.shape[-1] == 0
    assert to_dense(blocks).shape == shape


def test_selection_keeps_order_and_missing_entries():
    index = jnp.asarray([[[[2, 0]], [[-1, -1]], [[1, -1]]]], jnp.int32)
    score = jnp.asarray([[[[0.5, 0.25]], [[-jnp.inf] * 2], [[3.0, -jnp.inf]]]])
    blocks = BlockCSR.from_selection(index, score, 4)
    np.testing.assert_array_equal(blocks.indptr, [[[0, 2, 4, 6]]])
    np.testing.assert_array_equal(blocks.indices, [[[2, 0, -1, -1, 1, -1]]])
    expected = np.full((1, 1, 3, 4), np.nan, np.float32)
    expected[0, 0, 0, [2, 0]], expected[0, 0, 2, 1] = [0.5, 0.25], 3
    np.testing.assert_array_equal(to_dense(blocks), expected)
    np.testing.assert_array_equal(BlockCSR.from_selection(index, None, 4).values, 0)


def test_transpose():
    rng = np.random.default_rng(1)
    mask, values = random_mask(rng)
    blocks = BlockCSR.from_mask(mask, values)
    transposed, order = jax.jit(BlockCSR.transpose)(blocks)
    np.testing.assert_array_equal(to_dense(transposed), values.swapaxes(2, 3))
    for b, h in np.ndindex(mask.shape[:2]):
        count = mask[b, h].sum()
        assert sorted(np.asarray(order[b, h])) == list(range(order.shape[-1]))
        rows = np.asarray(transposed.indices[b, h])
        assert np.all(rows[count:] == -1)
        for column in range(mask.shape[3]):
            start, end = np.asarray(transposed.indptr[b, h, column : column + 2])
            assert np.all(np.diff(rows[start:end]) > 0)
    taken = np.take_along_axis(np.asarray(blocks.values), np.asarray(order), -1)
    np.testing.assert_array_equal(transposed.values, taken)


def test_transpose_of_transpose():
    _, values = random_mask(np.random.default_rng(2))
    blocks = BlockCSR.from_mask(~np.isnan(values), values)
    again, _ = blocks.transpose()[0].transpose()
    np.testing.assert_array_equal(again.indptr, blocks.indptr)
    np.testing.assert_array_equal(again.indices, blocks.indices)
    np.testing.assert_array_equal(to_dense(again), values)


def test_transpose_drops_empty_entries():
    index = jnp.asarray([[[[-1, 1]], [[1, -1]], [[0, 1]]]], jnp.int32)
    transposed, order = BlockCSR.from_selection(index, None, 2).transpose()
    np.testing.assert_array_equal(transposed.indptr, [[[0, 1, 4]]])
    np.testing.assert_array_equal(transposed.indices, [[[2, 0, 1, 2, -1, -1]]])
    np.testing.assert_array_equal(order, [[[4, 1, 2, 5, 0, 3]]])


def test_bad_inputs():
    index = jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"index has shape \(1, 2, 3\)"):
        BlockCSR.from_selection(index, None, 4)
    with pytest.raises(ValueError, match="score has shape"):
        BlockCSR.from_selection(index[None], jnp.zeros((1, 1, 2, 4)), 4)
    with pytest.raises(ValueError, match="mask has shape"):
        BlockCSR.from_mask(np.ones((2, 3, 4), bool))
    with pytest.raises(ValueError, match="values has shape"):
        BlockCSR.from_mask(np.ones((3, 4), bool), np.ones((4, 3)))
