"""Forward and dQ: tiles of queries that walk over their keys."""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.hopper import HALF, LOG2E, Ring
from pallas_kernels.range_attention.mosaic_gpu.plan import (
    Config,
    Sizes,
    by_tile,
    by_token,
    plan_queries,
)


class KeyWalk:
    """A thread block that walks, for each of its tiles of queries, over their keys.

    `at` has the references: q, k, v, plan and bias in device memory, `tiles` (the arrays that
    belong to a tile) and k_tile, v_tile, bias_tile in shared memory, and the rings' barriers.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.q_ring = Ring(config.places, *at.q_ring)
        self.k_ring = Ring(config.stages, *at.k_ring)
        self.v_ring = Ring(config.stages, *at.v_ring)
        self.rows = hopper.half_of(at.warpgroup)

    @staticmethod
    def scratch(sizes: Sizes, config: Config, copies: int):
        """What every walk over keys needs; `copies` make a tile."""
        keys = hopper.operand_tile((config.stages, config.step, sizes.head_dim))
        bias = plgpu.SMEM((config.stages, config.step), jnp.float32)
        return {
            "q_tile": hopper.operand_tile((config.places, sizes.rows, sizes.head_dim)),
            "plan_tile": plgpu.SMEM((config.places, 3, sizes.rows), jnp.int32),
            "k_tile": keys,
            "v_tile": keys,
            "bias_tile": bias if sizes.biased else None,
            "q_ring": Ring.barriers(config.places, copies, config.computing),
            "k_ring": Ring.barriers(config.stages, 1 + sizes.biased, config.computing),
            "v_ring": Ring.barriers(config.stages, 1, config.computing),
        }

    @property
    def own_items(self):
        """How many items this block has."""
        return hopper.share(self.sizes.items, self.at)

    def locate(self, i):
        """(batch element, tile, KV head) of this block's item i."""
        return self.sizes.locate(self.at.program + i * self.at.programs, self.sizes.tiles)

    def load_rows(self, x, tile_ref, place, ready, b, tile, h):
        """Copies a tile's rows of x [B, T, Hq, D], head by head."""
        width, groups = self.sizes.width, self.sizes.groups

        def load(g):
            source = x.at[b, pl.ds(tile * width, width), h * groups + g]
            target = tile_ref.at[place, pl.ds(g * width, width)]
            plgpu.copy_gmem_to_smem(source, target, ready)

        hopper.by_warp(groups, load)

    def load_tile(self, place, ready, b, tile, h):
        """Starts the copies that make a tile."""
        at = self.at
        plgpu.copy_gmem_to_smem(at.plan.at[b, tile], at.plan_tile.at[place], ready)
        self.load_rows(at.q, at.q_tile, place, ready, b, tile, h)

    def load(self):
        """Fills the rings, item after item."""
        at, step = self.at, self.config.step

        def load_item(i, turn):
            b, tile, h = self.locate(i)
            place = self.q_ring.claim(i)
            self.load_tile(place, self.q_ring.ready.at[place], b, tile, h)
            first, steps = at.plan[b, tile, 2, 0], at.plan[b, tile, 2, 1]

            @pl.loop(0, steps)
            def _(j):
                keys = pl.ds(pl.multiple_of(first + j * step, 8), step)
                slot = self.k_ring.claim(turn + j)
                ready = self.k_ring.ready.at[slot]
                plgpu.copy_gmem_to_smem(at.k.at[b, keys, h], at.k_tile.at[slot], ready)
                if self.sizes.biased:
                    plgpu.copy_gmem_to_smem(at.bias.at[b, h, keys], at.bias_tile.at[slot], ready)
                slot = self.v_ring.claim(turn + j)
                ready = self.v_ring.ready.at[slot]
                plgpu.copy_gmem_to_smem(at.v.at[b, keys, h], at.v_tile.at[slot], ready)

            return turn + steps

        lax.fori_loop(0, self.own_items, load_item, jnp.int32(0))

    def bias(self, slot):
        """The keys' bias, as a function of the shape of a step's logits; or None."""
        if not self.sizes.biased:
            return None
        column = plgpu.load(self.at.bias_tile.at[slot], layout=hopper.COLUMN)
        return functools.partial(hopper.along_columns, column)

    def hide(self, place, j):
        """What hides the keys of step j that a row does not see."""
        plan = self.at.plan_tile.at[place]
        bounds = (plgpu.load(plan.at[n, self.rows], layout=hopper.ROW) for n in (0, 1))
        origin = plan[2, 0] + j * self.config.step
        first, last = (x - origin for x in bounds)
        return lambda logits: hopper.keep(logits, 1, first, last)

    def walk(self, place, step, carry, leave: int = 0):
        """Runs `step(hide, j, carry)` over the keys of a tile.

        Args:
          place: of the tile.
          step: what to do.
          carry: arrays.
          leave: steps that are left out at the end.

        Returns:
          The steps of the tile, with those, and the last carry.
        """

        # Numbers are read where they are needed, so that no register holds them before.
        def number(n):
            return self.at.plan_tile[place, 2, n]

        def masked(j, carry):
            return step(self.hide(place, j), j, carry)

        def stop():
            return number(1) - leave

        whole_first = jnp.minimum(number(2), stop())
        carry = lax.fori_loop(0, whole_first, masked, carry)
        whole_first, whole_last = (jnp.minimum(number(n), stop()) for n in (2, 3))
        carry = lax.fori_loop(whole_first, whole_last, functools.partial(step, None), carry)
        whole_last = jnp.minimum(number(3), stop())
        carry = lax.fori_loop(whole_last, stop(), masked, carry)
        return number(1), carry

    def store_rows(self, tile_ref, place, out, b, tile, h):
        """Starts the copies of this warpgroup's rows of a tile to out [B, T, Hq, D]."""
        width, groups = self.sizes.width, self.sizes.groups
        chunk = math.gcd(width, HALF)  # rows of one head
        # Asked for again, or the compiler would divide before all tiles, and spill what it gets.
        own = lax.axis_index("warpgroup")

        def store(n):
            row = own * HALF + n * chunk
            head = lax.div(row, width)

            @pl.when(head < groups)
            def _():
                token = pl.ds(tile * width + lax.rem(row, width), chunk)
                source = tile_ref.at[place, pl.ds(row, chunk)]
                target = out.at[b, token, h * groups + head]
                plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        for n in range(HALF // chunk):
            store(n)
        plgpu.commit_smem_to_gmem_group()

    def finish_store(self, i):
        """Waits for the copies of item i's results, then gives its place back."""
        plgpu.wait_smem_to_gmem(0)
        self.q_ring.release(i)


class _Forward(KeyWalk):
    def compute(self):
        """Attends, item after item."""
        lax.fori_loop(0, self.own_items, self._attend, jnp.int32(0))
        if self.config.places > 1:
            self.finish_store(self.own_items - 1)

    def _attend(self, i, turn):
        at, head_dim = self.at, self.sizes.head_dim
        place = self.q_ring.receive(i)

        def finish_last():
            # With several places, results are on their way out while the next item has begun.
            pl.when((i > 0) & (self.config.places > 1))(lambda: self.finish_store(i - 1))

        sums = (
            hopper.full((HALF, head_dim), 0),
            hopper.full((HALF,), hopper.LOWEST, hopper.ROW),
            hopper.full((HALF,), 0, hopper.ROW),
        )
        steps, (acc, top, total) = self._sum_up(place, turn, finish_last, sums)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        normalised = acc * hopper.along_rows(1 / total, acc.shape)
        at.q_tile[place, self.rows] = normalised.astype(at.q.dtype)
        lse = top * (1 / LOG2E) + jnp.log(total)
        at.lse_tile[place, self.rows] = jnp.where(some, lse, -jnp.inf)
        plgpu.commit_smem()
        b, tile, h = self.locate(i)
        source, target = at.lse_tile.at[place, self.rows], at.lse.at[b, tile, h, self.rows]
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        self.store_rows(at.q_tile, place, at.out, b, tile, h)
        if self.config.places == 1:
            self.finish_store(i)
        return turn + steps

    def _sum_up(self, place, turn, finish_last, sums):
        """The steps of a tile, and the sums after them.

        The next step's product is computed during a step's softmax.
        """
        products, _ = self._multiply(place, turn, finish_last)

        def step(hide, j, carry):
            products, sums = carry
            add = functools.partial(self._add, products, turn + j, hide, sums)
            return self._multiply(place, turn + j + 1, add)

        steps, (products, sums) = self.walk(place, step, (products, sums), leave=1)
        hide = self.hide(place, steps - 1)
        return steps, self._add(products, turn + steps - 1, hide, sums)

    def _multiply(self, place, turn, meanwhile):
        """The products of a tile and the keys of a step, and what `meanwhile` returns."""
        keys = self.at.k_tile.at[self.k_ring.receive(turn)]

        def compute(acc):
            plgpu.wgmma(acc, self.at.q_tile.at[place, self.rows], hopper.transposed(keys))
            result = meanwhile()
            return acc[...], result

        return pl.run_scoped(compute, plgpu.ACC((HALF, self.config.step), jnp.float32))

    def _add(self, products, turn, hide, sums):
        """Attends to the keys of a step; they are given back."""
        at, slot = self.at, lax.rem(turn, self.config.stages)
        acc, top, total = sums
        scale = self.sizes.scale * LOG2E
        if self.sizes.biased or scale <= 0:
            logits = hopper.logits(products, self.bias(slot), hide, scale=self.sizes.scale)
            scale = 1
        else:  # scaled while the largest is subtracted, which costs nothing
            logits = products if hide is None else hide(products)
        self.k_ring.release(turn)
        new_top = jnp.maximum(top, logits.max(axis=1) * scale)
        decay = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits * scale - hopper.along_rows(new_top, logits.shape))
        acc = acc * hopper.along_rows(decay, acc.shape)
        total = total * decay + weights.sum(axis=1)
        self.v_ring.receive(turn)
        acc = hopper.multiply_add(acc, weights.astype(at.v.dtype), at.v_tile.at[slot])
        self.v_ring.release(turn)
        return acc, new_top, total


class _QueryGradient(KeyWalk):
    def load_tile(self, place, ready, b, tile, h):
        super().load_tile(place, ready, b, tile, h)
        at = self.at
        self.load_rows(at.out_bar, at.out_bar_tile, place, ready, b, tile, h)
        plgpu.copy_gmem_to_smem(at.sums.at[b, tile, h], at.sums_tile.at[place], ready)

    def compute(self):
        """dQ of item after item."""
        lax.fori_loop(0, self.own_items, self._compute_item, jnp.int32(0))

    def _compute_item(self, i, turn):
        at, sums = self.at, self.at.sums_tile
        place = self.q_ring.receive(i)
        lse, delta = (plgpu.load(sums.at[place, n, self.rows], layout=hopper.ROW) for n in (0, 1))

        def step(hide, j, acc):
            return self._step(place, turn + j, hide, lse, delta, acc)

        steps, acc = self.walk(place, step, hopper.full((HALF, self.sizes.head_dim), 0))
        at.q_tile[place, self.rows] = (acc * self.sizes.scale).astype(at.q.dtype)
        plgpu.commit_smem()
        self.store_rows(at.q_tile, place, at.q_bar, *self.locate(i))
        self.finish_store(i)
        return turn + steps

    def _step(self, place, turn, hide, lse, delta, acc):
        """Adds what the keys of one step contribute."""
        at = self.at
        slot = self.k_ring.receive(turn)
        queries, out_bar = (x.at[place, self.rows] for x in (at.q_tile, at.out_bar_tile))
        keys, values = at.k_tile.at[slot], at.v_tile.at[slot]
        logits = hopper.scores(queries, keys, self.bias(slot), hide, scale=self.sizes.scale)
        weights = jnp.exp2(logits - hopper.along_rows(lse, logits.shape))
        self.v_ring.receive(turn)
        weights_bar = hopper.multiply(out_bar, hopper.transposed(values), logits.shape)
        self.v_ring.release(turn)
        logits_bar = weights * (weights_bar - hopper.along_rows(delta, logits.shape))
        acc = hopper.multiply_add(acc, logits_bar.astype(at.k.dtype), keys)
        self.k_ring.release(turn)
        return acc


def forward_scratch(sizes: Sizes, config: Config):
    """What `forward` needs in shared memory."""
    return KeyWalk.scratch(sizes, config, copies=sizes.groups + 1) | {
        "lse_tile": plgpu.SMEM((config.places, sizes.rows), jnp.float32),
    }


def query_gradient_scratch(sizes: Sizes, config: Config):
    """What `query_gradient` needs in shared memory."""
    scratch = KeyWalk.scratch(sizes, config, copies=2 * sizes.groups + 2)
    return scratch | {
        "out_bar_tile": scratch["q_tile"],
        "sums_tile": plgpu.SMEM((config.places, 2, sizes.rows), jnp.float32),
    }


def _roles(walk: type[KeyWalk], sizes: Sizes, config: Config, loader_registers: int):
    """Who runs the kernel, for `hopper.launch`."""
    return hopper.roles(
        functools.partial(walk, sizes, config), loader_registers, computing=config.computing
    )


@functools.partial(jax.jit, static_argnames=("scale", "config"))
def forward(q, k, v, start, end, key_bias, *, scale, config: Config):
    """out [B, T, Hq, D] and lse f32 [B, T, Hq]; key_bias is [B, Hkv, N] or None."""
    sizes = Sizes.of(q, k, key_bias, scale, config)
    plan = plan_queries(start, end, sizes, config.step)
    lse_shape = sizes.batch, sizes.tiles, sizes.num_kv_heads, sizes.rows
    results = hopper.launch(
        "range_forward",
        _roles(_Forward, sizes, config, loader_registers=32),
        programs=min(config.programs, sizes.items),
        operands={"q": q, "k": k, "v": v, "plan": plan, "bias": key_bias},
        outputs={"out": q, "lse": jax.ShapeDtypeStruct(lse_shape, jnp.float32)},
        scratch=forward_scratch(sizes, config),
        warpgroups=config.computing + 1,
    )
    return results["out"], by_token(results["lse"], sizes)


@functools.partial(jax.jit, static_argnames=("scale", "config"))
def query_gradient(q, k, v, start, end, key_bias, out_bar, lse, delta, *, scale, config: Config):
    """dQ [B, T, Hq, D], from lse in units of log 2 and delta, f32 [B, T, Hq]."""
    sizes = Sizes.of(q, k, key_bias, scale, config)
    plan = plan_queries(start, end, sizes, config.step)
    sums = jnp.stack([by_tile(x, sizes) for x in (lse, delta)], axis=3)
    return hopper.launch(
        "range_query_gradient",
        _roles(_QueryGradient, sizes, config, loader_registers=56),
        programs=min(config.programs, sizes.items),
        operands={
            "q": q, "k": k, "v": v, "plan": plan, "bias": key_bias, "out_bar": out_bar,
            "sums": sums,
        },
        outputs={"q_bar": q},
        scratch=query_gradient_scratch(sizes, config),
        warpgroups=config.computing + 1,
    )["q_bar"]  # fmt: skip
