"""dK, dV and the gradient of the bias: tiles of keys that walk over the queries that see them."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.hopper import HALF, ROWS, Ring
from pallas_kernels.range_attention.mosaic_gpu.plan import Config, Sizes, plan_keys


class QueryWalk:
    """A thread block that walks, for each of its tiles of keys, over the queries that see them.

    Products are transposed: rows are the keys of one half of the tile, columns are the queries of
    one head in one step.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.key_ring = Ring(1, *at.key_ring)
        self.query_ring = Ring(config.stages, *at.query_ring)
        self.rows = hopper.half_of(at.warpgroup)
        self.own_items = hopper.share(sizes.key_items, at)

    @staticmethod
    def scratch(sizes: Sizes, config: Config):
        """What the walk needs in shared memory."""
        keys = hopper.operand_tile((ROWS, sizes.head_dim))
        queries = hopper.operand_tile((config.stages, config.step, sizes.head_dim))
        return {
            "k_tile": keys,
            "v_tile": keys,
            "bias_tile": plgpu.SMEM((ROWS,), jnp.float32) if sizes.biased else None,
            "plan_tile": plgpu.SMEM((2, 8), jnp.int32),
            "q_tile": queries,
            "out_bar_tile": queries,
            "ranges_tile": plgpu.SMEM((config.stages, 2, config.step), jnp.int32),
            "sums_tile": plgpu.SMEM((config.stages, 2, config.step), jnp.float32),
            "key_ring": Ring.barriers(1, 3 + sizes.biased),
            "query_ring": Ring.barriers(config.stages, 4),
        }

    def _locate(self, i):
        """(batch element, tile, KV head) of this block's item i."""
        return self.sizes.locate(self.at.program + i * self.at.programs, self.sizes.key_tiles)

    def load(self):
        """Fills the rings, item after item."""
        lax.fori_loop(0, self.own_items, self._load_item, jnp.int32(0))

    def _load_item(self, i, turn):
        at, copy = self.at, plgpu.copy_gmem_to_smem
        b, tile, h = self._locate(i)
        keys = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)
        self.key_ring.claim(i)
        ready = self.key_ring.ready.at[0]
        copy(at.k.at[b, keys, h], at.k_tile, ready)
        copy(at.v.at[b, keys, h], at.v_tile, ready)
        copy(at.plan.at[b, tile], at.plan_tile, ready)
        if self.sizes.biased:
            copy(at.bias.at[b, h, keys], at.bias_tile, ready)
        first, steps = at.plan[b, tile, 0, 0], at.plan[b, tile, 0, 1]

        @pl.loop(0, self.sizes.groups)
        def _(g):
            head = h * self.sizes.groups + g

            @pl.loop(0, steps)
            def _(j):
                slot = self.query_ring.claim(turn + g * steps + j)
                ready = self.query_ring.ready.at[slot]
                tokens = pl.ds(pl.multiple_of(first + j * self.config.step, 8), self.config.step)
                copy(at.q.at[b, tokens, head], at.q_tile.at[slot], ready)
                copy(at.out_bar.at[b, tokens, head], at.out_bar_tile.at[slot], ready)
                copy(at.ranges.at[b, :, tokens], at.ranges_tile.at[slot], ready)
                copy(at.sums.at[b, head, :, tokens], at.sums_tile.at[slot], ready)

        return turn + self.sizes.groups * steps

    def compute(self):
        """dK, dV and the bias' gradient of item after item."""
        lax.fori_loop(0, self.own_items, self._compute_item, jnp.int32(0))

    def _compute_item(self, i, turn):
        groups = self.sizes.groups
        self.key_ring.receive(i)
        shape = (HALF, self.sizes.head_dim)
        carry = (hopper.full(shape, 0), hopper.full(shape, 0))
        if self.sizes.biased:
            carry = (*carry, hopper.full((HALF,), 0, hopper.ROW))

        def head(g, carry):
            first_turn = turn + g * self._plan(1)

            def skip(j, _):
                self.query_ring.receive(first_turn + j)
                self.query_ring.release(first_turn + j)

            def step(masked, j, carry):
                return self._step(first_turn + j, masked, carry)

            # Read from shared memory when needed: the accumulators leave few registers.
            lax.fori_loop(0, self._plan(2), skip, None)
            for first, last, masked in ((2, 4, True), (4, 5, False), (5, 3, True)):
                of_part = functools.partial(step, masked)
                carry = lax.fori_loop(self._plan(first), self._plan(last), of_part, carry)
            lax.fori_loop(self._plan(3), self._plan(1), skip, None)
            return carry

        k_bar, v_bar, *bias_bar = lax.fori_loop(0, groups, head, carry)
        turn += groups * self._plan(1)
        self._store(*self._locate(i), k_bar * self.sizes.scale, v_bar, *bias_bar)
        self.key_ring.release(i)
        return turn

    def _plan(self, n):
        """A number of the plan of this warpgroup's half."""
        return self.at.plan_tile[self.at.warpgroup, n]

    def _step(self, turn, masked, carry):
        """Adds what the queries of one step contribute."""
        at = self.at
        k_bar, v_bar, *bias_bar = carry
        slot = self.query_ring.receive(turn)
        queries, out_bar = at.q_tile.at[slot], at.out_bar_tile.at[slot]
        bias = self._bias if self.sizes.biased else None
        hide = functools.partial(self._hide, slot) if masked else None
        logits = hopper.scores(at.k_tile.at[self.rows], queries, bias, hide, scale=self.sizes.scale)
        # Each load as late as possible, for the same reason.
        lse = plgpu.load(at.sums_tile.at[slot, 0], layout=hopper.COLUMN)
        weights = jnp.exp2(logits - hopper.along_columns(lse, logits.shape))
        v_bar = hopper.multiply_add(v_bar, weights.astype(at.q.dtype), out_bar)
        delta = plgpu.load(at.sums_tile.at[slot, 1], layout=hopper.COLUMN)
        shifted = hopper.along_columns(-delta, weights.shape)
        shifted = hopper.multiply_add(shifted, at.v_tile.at[self.rows], hopper.transposed(out_bar))
        logits_bar = weights * shifted
        k_bar = hopper.multiply_add(k_bar, logits_bar.astype(at.q.dtype), queries)
        self.query_ring.release(turn)
        return k_bar, v_bar, *(x + logits_bar.sum(axis=1) for x in bias_bar)

    def _bias(self, shape):
        """The keys' bias, as a matrix."""
        row = plgpu.load(self.at.bias_tile.at[self.rows], layout=hopper.ROW)
        return hopper.along_rows(row, shape)

    def _hide(self, slot, logits):
        """Hides the keys that a step's queries do not see."""
        origin = self._plan(6)

        def bound(n):
            return plgpu.load(self.at.ranges_tile.at[slot, n], layout=hopper.COLUMN) - origin

        # start <= key < end, as columns: each bound is loaded when the other is done with.
        logits = hopper.keep(logits, 0, at_least=bound(0))
        return hopper.keep(logits, 0, below=bound(1))

    def _store(self, b, tile, h, k_bar, v_bar, bias_bar=None):
        """Copies the gradients of this warpgroup's keys out, through the keys' own place."""
        at = self.at
        at.k_tile[self.rows] = k_bar.astype(at.k.dtype)
        at.v_tile[self.rows] = v_bar.astype(at.v.dtype)
        if bias_bar is not None:
            at.bias_tile[self.rows] = bias_bar
        plgpu.commit_smem()
        keys = pl.ds(pl.multiple_of(tile * ROWS + at.warpgroup * HALF, HALF), HALF)
        plgpu.copy_smem_to_gmem(at.k_tile.at[self.rows], at.k_bar.at[b, keys, h])
        plgpu.copy_smem_to_gmem(at.v_tile.at[self.rows], at.v_bar.at[b, keys, h])
        if bias_bar is not None:
            plgpu.copy_smem_to_gmem(at.bias_tile.at[self.rows], at.bias_bar.at[b, h, keys])
        plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("scale", "config"))
def key_gradients(q, k, v, start, end, key_bias, out_bar, lse, delta, *, scale, config: Config):
    """dK, dV [B, N, Hkv, D] and the bias' gradient, f32 [B, Hkv, N] or None."""
    sizes = Sizes.of(q, k, key_bias, scale, config)
    outputs = {"k_bar": k, "v_bar": v}
    if sizes.biased:  # for whole tiles: what a copy has past the end of a row falls into the next
        shape = sizes.batch, sizes.num_kv_heads, sizes.key_tiles * ROWS
        outputs["bias_bar"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    results = hopper.launch(
        "range_key_gradients",
        hopper.roles(functools.partial(QueryWalk, sizes, config), loader_registers=24),
        programs=min(config.programs, sizes.key_items),
        operands={
            "q": q, "k": k, "v": v, "plan": plan_keys(start, end, sizes, config.step),
            "bias": key_bias, "out_bar": out_bar, "ranges": jnp.stack([start, end], axis=1),
            "sums": jnp.stack([lse, delta], axis=-1).transpose(0, 2, 3, 1),
        },
        outputs=outputs,
        scratch=QueryWalk.scratch(sizes, config),
    )  # fmt: skip
    bias_bar = results["bias_bar"][..., : sizes.num_keys] if sizes.biased else None
    return results["k_bar"], results["v_bar"], bias_bar
