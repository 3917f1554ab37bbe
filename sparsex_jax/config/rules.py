"""What all configurations have in common: types and rules that are checked at construction."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

SEEDS = 1 << 32  # JAX's random keys hold 32 bits of a seed


class ConfigError(ValueError):
    """A field has a value that its rule forbids; the message names both and the way out."""


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with a message unless something holds."""
    if not holds:
        raise ConfigError(message)


def require_positive(config, *names: str) -> None:
    """Raises ConfigError unless fields are above 0."""
    types_of = {field.name: field.type for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        way_out = "use a number above 0" if types_of[name] is float else "use at least 1"
        require(value > 0, f"{name}={value} must be positive: {way_out}")


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed that JAX or NumPy cannot take, or not distinguish."""
    require(0 <= seed < SEEDS, f"seed={seed} must lie in [0, 2^32): use 0, say")


def _has_type(value: Any, wanted: Any) -> bool:
    """Whether a value is of the type of an annotation; an int is a float, too, a bool neither."""
    parts = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if typing.get_origin(wanted) is Literal:
        return isinstance(value, str) and value in parts
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, tuple) and parts[-1] is ...:
            parts = parts[:1] * len(value)
        return (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(map(_has_type, value, parts))
        )
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)


def check_types(config) -> None:
    """Raises ConfigError unless each field has the type of its annotation; floats are finite."""
    for field in dataclasses.fields(config):
        name, value, wanted = field.name, getattr(config, field.name), field.type
        if typing.get_origin(wanted) is Literal:
            rule = f"must be one of {', '.join(map(repr, typing.get_args(wanted)))}"
        else:
            rule = f"must be of type {wanted.__name__ if isinstance(wanted, type) else wanted}"
        require(_has_type(value, wanted), f"{name}={value!r} {rule}")
        if isinstance(value, float):
            require(math.isfinite(value), f"{name}={value} must be finite: use a number")


def multiples(value: int, unit: int) -> str:
    """The two multiples of `unit` around `value`, as advice."""
    below = value // unit * unit
    return f"use {below} or {below + unit}" if below else f"use {unit}"
