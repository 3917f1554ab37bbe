"""The shipped model on sequences that devices share: needles in other parts, and on a border."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsex_jax.commands.arguments import SHIPPED_MODEL
from sparsex_jax.config import MeshConfig
from sparsex_jax.parallel.mesh import make_mesh
from sparsex_jax.parallel.rules import partitions
from sparsex_jax.tasks import load
from sparsex_jax.tasks.needle import make_sample
from sparsex_jax.training.models import load_model
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.step import place_state
from tests.parallel.devices import compile_quickly, on_devices

PARTS, PART = 4, 512
LENGTH = PARTS * PART
TEXT = "def f(x):\n    return x + 1\n\n\nclass C:\n    pass\n" * 200


def sample(tokenizer, chosen):
    """The first of some needles whose line, from begin to end, is chosen."""
    haystack = tokenizer.encode(TEXT)
    for seed in range(1000):
        found = make_sample(
            "single_2", LENGTH, rng=np.random.default_rng(seed), tokenizer=tokenizer,
            haystack=haystack, answer_room=0,
        )  # fmt: skip
        if chosen(*found.lines[0]):
            return found
    raise AssertionError("there is no such needle")


@pytest.mark.parametrize("strategy", ["dispatch", pytest.param("ring", marks=pytest.mark.long)])
@on_devices
def test_needles_in_other_parts_and_on_borders_are_found(strategy):
    tokenizer = load()
    asked = [
        sample(tokenizer, lambda begin, end: PART < begin and end < 2 * PART),
        sample(tokenizer, lambda begin, end: begin + 8 < 2 * PART < end - 8),
    ]
    tokens = np.stack([np.concatenate((each.prompt, each.answer)) for each in asked])
    _, model = load_model(SHIPPED_MODEL, "float32", compute_dtype="float32")
    skeleton, params = split_model(model)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, seq=PARTS, tensor=1))

    def predict(params, tokens):
        model = skeleton.build(params)
        hidden = model(tokens, implementation="reference", sequence_strategy=strategy)
        return model.logits(hidden).argmax(-1)

    specs, split = partitions(params, skeleton.axes, mesh.shape), P("data", "seq")
    forward = jax.shard_map(predict, mesh=mesh, in_specs=(specs, split), out_specs=split)
    operands = place_state({"params": params}, skeleton, mesh)["params"], tokens
    predicted = np.asarray(compile_quickly(jax.jit(forward).lower(*operands))(*operands))
    for each, found in zip(asked, predicted, strict=True):
        np.testing.assert_array_equal(found[len(each.prompt) - 1 : -1], each.answer)
