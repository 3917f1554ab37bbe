"""The op on Hopper GPUs: what it compiles to, and the way that it takes without gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.block_selection import mosaic_gpu as selection
from pallas_kernels.block_sparse_attention import mosaic_gpu as block_sparse
from pallas_kernels.range_attention import mosaic_gpu as range_kernels
from sparsex_jax import attention
from sparsex_jax.config import AttentionConfig
from tests.pallas_kernels.accuracy import assert_accurate
from tests.pallas_kernels.hopper_interpreter import cut_small, interpret
from tests.pallas_kernels.test_range_attention_mosaic_gpu import kernel_calls
from tests.test_attention import attend, make_inputs


def calls(compilation, kernel: str) -> int:
    """How often a program calls a kernel."""
    return sum(f"/{kernel}/" in line for line in kernel_calls(compilation))


class TestCompiled:
    """16 query heads and 2 KV heads of width 128, compiled for an H200."""

    @staticmethod
    def inputs(tokens=2**20):
        shapes = jax.eval_shape(
            lambda: jax.tree.map(
                jnp.asarray, make_inputs(AttentionConfig(), 128, heads=16, kv_heads=2, dim=128)
            )
        )
        gates = "salience", "landmark_gate", "dynamic_gate"
        return {
            name: jax.ShapeDtypeStruct(
                (1, x.shape[1] * tokens // 128, *x.shape[2:]),
                x.dtype if name in gates else jnp.bfloat16,
            )
            for name, x in shapes.items()
        }

    @staticmethod
    def forward(inputs):
        return attend(AttentionConfig(), inputs, implementation="mosaic_gpu")

    @classmethod
    def gradients(cls, inputs, cotangent):
        return jax.vjp(cls.forward, inputs)[1](cotangent)

    @pytest.mark.long
    def test_forward_takes_less_than_q(self):
        inputs = self.inputs()
        compilation = compile_for("h200", self.forward, inputs)
        assert compilation.temporary_bytes < 0.75 * 2 * inputs["q"].size
        assert calls(compilation, "combine_entries") == 1
        # Neither q's chunks nor the result are copied: only kernels and RoPE touch them.
        for line in compilation.executable.as_text().splitlines():
            result, _, rest = line.partition(" = ")
            whole = rest.startswith(("bf16[1,1048576,16,128]", "bf16[1,262144,64,128]"))
            moved = "fusion-start(" in rest and "16,128]" in rest
            moved |= whole and any(x in rest for x in (" copy(", " fusion(", " broadcast("))
            assert not moved, f"{result}, {rest[:200]}"

    @pytest.mark.long
    @pytest.mark.parametrize("tokens", [2**18, 2**20])
    def test_backward_takes_less_than_three_times_q(self, tokens):
        inputs = self.inputs(tokens)
        compilation = compile_for("h200", self.gradients, inputs, inputs["q"])
        assert compilation.temporary_bytes < 3 * 2 * inputs["q"].size
        for dear in ("block_sparse_forward", "find_groups", "score_groups"):
            assert calls(compilation, dear) == 1, "computed anew, or by XLA twice"

    @pytest.mark.long
    def test_backward_computes_nothing_anew(self):
        inputs = self.inputs(2**17)
        compilation = compile_for("h200", self.gradients, inputs, inputs["q"])
        assert compilation.temporary_bytes < 6 * 2 * inputs["q"].size
        assert calls(compilation, "range_forward") == 2  # window and landmarks


class TestInPlace:
    """Without gradients, on Hopper GPUs, the branches are added up by one kernel; interpreted."""

    CONFIG = AttentionConfig(
        window=64, top_k=2, segment_length=64, landmarks_per_segment=2, nodes_per_level=2,
        near_reach=128, recency=True,
    )  # fmt: skip

    @pytest.mark.timeout(300, method="thread")
    @pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.long)])
    def test_equals_the_others(self, monkeypatch, packed):
        """Documents in one chunk, or two KV heads one by one, in two chunks that overlap."""
        tokens, kv_heads = (192, 1) if packed else (320, 2)
        inputs = make_inputs(self.CONFIG, tokens, heads=8 * kv_heads, kv_heads=kv_heads, dim=64)
        gates = "salience", "landmark_gate", "dynamic_gate", "recency"
        inputs = {n: x if n in gates else jnp.asarray(x, jnp.bfloat16) for n, x in inputs.items()}
        if packed:
            inputs["segment_ids"] = np.repeat([0, 1], [64, 128])[None]
        else:
            monkeypatch.setattr(attention, "_CHUNK", 64)
            monkeypatch.setitem(attention._MAX_CHUNKS, "in_place", 2)
        found = {}
        for name, dtype in (("xla", jnp.bfloat16), ("reference", jnp.float32)):
            typed = {n: x.astype(dtype) if n in "qkv" else x for n, x in inputs.items()}
            found[name] = attend(self.CONFIG, typed, implementation=name)
        monkeypatch.setattr(attention, "fuse", None)  # not used
        for package in (block_sparse, range_kernels, selection):
            cut_small(monkeypatch, package, programs=3)
        with interpret():
            run = jax.jit(functools.partial(attend, self.CONFIG, implementation="mosaic_gpu"))
            ours = run(inputs)
        assert_accurate(["out"], ours, found["xla"], found["reference"])

    def test_not_where_gradients_are_taken(self):
        inputs = make_inputs(self.CONFIG, 192, heads=8, kv_heads=1, dim=64)
        inputs = {n: jnp.asarray(x, jnp.bfloat16) for n, x in inputs.items()}

        def run(q):
            return attend(self.CONFIG, inputs | {"q": q}, implementation="mosaic_gpu")

        with interpret():
            both = str(jax.make_jaxpr(lambda q: jax.vjp(run, q)[1](q))(inputs["q"]))
            alone = str(jax.make_jaxpr(jax.vmap(run))(inputs["q"][None]))
        assert "block_sparse_query_gradient" in both and "combine_entries" in both
        assert "block_sparse_forward" in alone
