"""Layers that repeat become loops, so that a deep model compiles as fast as its pattern."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsex_jax.config import ConfigError

# Of fewer repetitions the program is written out: a loop's turns cost launches on a GPU.
FEWEST = 4

Carry = Any
Apply = Callable[[Any, Carry], tuple[Carry, Any]]


def apply_layers(
    layers: Sequence[nnx.Module], apply: Apply, carry: Carry, *, remat: bool = False
) -> tuple[Carry, list[Any]]:
    """Applies layer after layer, `carry, output = apply(layer, carry)`, repeated ones in a loop.

    Layers are alike if they differ in their parameters only. What a loop takes are copies of these,
    one layer's behind the other's.

    Args:
      layers: of any kinds.
      apply: of one of them; outputs are trees of arrays.
      carry: arrays, of the same types before and after each layer.
      remat: whether the backward pass recomputes each turn of a loop over several layers.

    Returns:
      The last carry, and each layer's output.

    Raises:
      ConfigError: `remat` without such a loop.
    """
    kinds, states = zip(*map(nnx.split, layers), strict=True)
    if remat and not any(_is_loop(kinds[n:]) for n in range(len(kinds))):
        raise ConfigError(
            f"remat='repetition' needs layers of which several repeat {FEWEST} times or more, as in"
            " 'ls' * 4: use remat='layer'"
        )
    return _apply(kinds, states, apply, carry, remat)


def _is_loop(kinds: Sequence) -> bool:
    """Whether several layers repeat at the beginning."""
    period, times = _longest_repetition(kinds)
    return period > 1 and times >= FEWEST


def _apply(
    kinds: Sequence, states: Sequence, apply: Apply, carry: Carry, remat: bool
) -> tuple[Carry, list[Any]]:
    outputs: list[Any] = []
    while kinds:
        period, times = _longest_repetition(kinds)
        if times < FEWEST:
            carry, output = apply(nnx.merge(kinds[0], states[0]), carry)
            outputs.append(output)
            kinds, states = kinds[1:], states[1:]
            continue
        pattern, end = kinds[:period], period * times
        stacked = [
            jax.tree.map(lambda *x: jnp.stack(x), *states[first:end:period])
            for first in range(period)
        ]

        def turn(carry, states, pattern=pattern):
            return _apply(pattern, states, apply, carry, False)

        if remat and period > 1:
            turn = jax.checkpoint(turn, prevent_cse=False)
        carry, found = jax.lax.scan(turn, carry, stacked)
        outputs += [jax.tree.map(lambda x, n=n: x[n], each) for n in range(times) for each in found]
        kinds, states = kinds[end:], states[end:]
    return carry, outputs


def _longest_repetition(kinds: Sequence) -> tuple[int, int]:
    """Period and times of the repetition at the beginning that takes in most layers.

    One with too few times counts as none, so that a longer one behind its first layer is found.
    """
    best = 1, 1
    for period in range(1, len(kinds) // FEWEST + 1):
        times = 1
        while kinds[times * period : (times + 1) * period] == kinds[:period]:
            times += 1
        if times >= FEWEST and period * times > best[0] * best[1]:
            best = period, times
    return best
