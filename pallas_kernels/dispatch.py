"""The choice of an implementation for each primitive: by platform, or by name."""

import dataclasses
import importlib
import logging
from collections.abc import Callable

import jax

logger = logging.getLogger("pallas_kernels")

PRIMITIVES = ("range_attention", "block_sparse_attention", "block_selection")

# Best first; the first that can run is taken when the caller names none.
PREFERENCE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


def _runs_anywhere(platform: str) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a primitive.

    Attributes:
      name: one of PREFERENCE.
      function: computes the primitive from validated operands.
      why_not: from a platform's name to the reason why it cannot run there, or None if it can.
    """

    name: str
    function: Callable
    why_not: Callable[[str], str | None] = _runs_anywhere

    def __post_init__(self):
        if self.name not in PREFERENCE:
            raise ValueError(f"name={self.name!r} must be one of {', '.join(PREFERENCE)}")


_registry: dict[str, dict[str, Implementation]] = {}
_logged: set[tuple[str, str]] = set()


def register(primitive: str, *implementations: Implementation) -> None:
    """Adds implementations of a primitive; one of the same name is replaced.

    Raises:
      ValueError: if `primitive` is not one of PRIMITIVES.
    """
    if primitive not in PRIMITIVES:
        raise ValueError(f"primitive={primitive!r} must be one of {', '.join(PRIMITIVES)}")
    _registry.setdefault(primitive, {}).update({each.name: each for each in implementations})


def _choose(primitive: str, platform: str) -> tuple[Implementation, str]:
    reasons = []
    for name in PREFERENCE:
        implementation = _registry[primitive].get(name)
        if implementation is None:
            continue
        why_not = implementation.why_not(platform)
        if why_not is None:
            return implementation, "; ".join([f"the first that runs on {platform}", *reasons])
        reasons.append(f"not {name}: {why_not}")
    raise RuntimeError(f"{primitive} has no implementation for {platform}: {'; '.join(reasons)}")


def _named(primitive: str, name: str, platform: str) -> Implementation:
    implementations = _registry[primitive]
    runnable = [each for each in PREFERENCE if each in implementations]
    runnable = [each for each in runnable if implementations[each].why_not(platform) is None]
    if name not in implementations:
        problem = f"is not an implementation of {primitive}"
    elif name not in runnable:
        problem = f"cannot run {primitive} on {platform}: {implementations[name].why_not(platform)}"
    else:
        return implementations[name]
    raise ValueError(f"implementation={name!r} {problem}; use {', '.join(runnable)} or None")


def select(primitive: str, implementation: str | None = None) -> Callable:
    """The function that computes `primitive` on JAX's default platform.

    Which one it is, and why, is logged the first time.

    Args:
      primitive: one of PRIMITIVES, already registered.
      implementation: a name, or None for the best that can run.

    Raises:
      ValueError: if the named implementation does not exist or cannot run here.
    """
    platform = jax.default_backend()
    if implementation is None:
        chosen, reason = _choose(primitive, platform)
    else:
        chosen, reason = _named(primitive, implementation, platform), "asked for by the caller"
    if (primitive, chosen.name) not in _logged:
        _logged.add((primitive, chosen.name))
        logger.info("%s: %s (%s)", primitive, chosen.name, reason)
    return chosen.function


def explain() -> list[tuple[str, str, str]]:
    """(primitive, implementation, reason) of what `select` takes here without a name."""
    platform = jax.default_backend()
    rows = []
    for primitive in PRIMITIVES:
        importlib.import_module(f"pallas_kernels.{primitive}")
        chosen, reason = _choose(primitive, platform)
        rows.append((primitive, chosen.name, reason))
    return rows
