"""The choice of an implementation for each primitive: by device and operands, or by name."""

import contextlib
import contextvars
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

logger = logging.getLogger("pallas_kernels")

PRIMITIVES = ("range_attention", "block_sparse_attention", "block_selection")

# Best first; the first that can run is taken when the caller names none.
PREFERENCE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")

# Their kinds, as JAX names them.
_TPUS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")


def _nothing(*_) -> str | None:
    return None


def not_hopper(device: jax.Device) -> str | None:
    """Why a kernel for Hopper GPUs cannot run on a device, or None if it can."""
    if device.platform == "gpu" and str(device.compute_capability).startswith("9."):
        return None
    return f"needs a GPU of compute capability 9.x (Hopper), not {device.device_kind}"


def not_tpu(device: jax.Device) -> str | None:
    """Why a kernel for TPUs cannot run on a device, or None if it can."""
    if device.platform == "tpu" and device.device_kind in _TPUS:
        return None
    return f"needs a TPU v5e, v5p or v6e, not {device.device_kind}"


def deferred(module: str, name: str) -> Callable:
    """The function `name` of a module that is imported by the first call.

    For implementations in Pallas, which takes a second to import.
    """
    return lambda *operands: getattr(importlib.import_module(module), name)(*operands)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a primitive.

    Attributes:
      name: one of PREFERENCE.
      function: computes the primitive from validated operands.
      why_not_on: from a device to the reason why it cannot run there, or None if it can.
      why_not_for: from the operands, likewise; they may be traced.
    """

    name: str
    function: Callable
    why_not_on: Callable[[jax.Device], str | None] = _nothing
    why_not_for: Callable[..., str | None] = _nothing

    def __post_init__(self):
        if self.name not in PREFERENCE:
            raise ValueError(f"name={self.name!r} must be one of {', '.join(PREFERENCE)}")

    def why_not(self, device: jax.Device, operands: tuple) -> str | None:
        """Why it cannot run; without operands, whatever they are."""
        return self.why_not_on(device) or (self.why_not_for(*operands) if operands else None)


def for_hopper(package: str, function: str, why_not_for: Callable[..., str | None]):
    """The Implementation "mosaic_gpu" of a primitive: `function` of `package`.mosaic_gpu."""
    return Implementation(
        "mosaic_gpu",
        deferred(f"{package}.mosaic_gpu", function),
        why_not_on=not_hopper,
        why_not_for=why_not_for,
    )


def for_tpu(package: str, function: str, why_not_for: Callable[..., str | None]):
    """The Implementation "mosaic_tpu" of a primitive: `function` of `package`.mosaic_tpu."""
    return Implementation(
        "mosaic_tpu",
        deferred(f"{package}.mosaic_tpu", function),
        why_not_on=not_tpu,
        why_not_for=why_not_for,
    )


def unfit_for_hopper(q, k, head_dims: tuple[int, ...]) -> str | None:
    """Why attention on Hopper GPUs does not take q [B, T, Hq, D] and k [B, N, Hkv, D], or None."""
    head_dim, groups = q.shape[3], q.shape[2] // k.shape[2]
    if q.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {q.dtype}"
    if head_dim not in head_dims:
        return f"takes head dimensions of {', '.join(map(str, head_dims))}, not {head_dim}"
    if groups > 16:
        return f"takes up to 16 query heads per KV head, not {groups}"
    return None


_registry: dict[str, dict[str, Implementation]] = {}
_logged: set[str] = set()
_target: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("target", default=None)


def register(primitive: str, *implementations: Implementation) -> None:
    """Adds implementations of a primitive; one of the same name is replaced.

    Raises:
      ValueError: if `primitive` is not one of PRIMITIVES.
    """
    if primitive not in PRIMITIVES:
        raise ValueError(f"primitive={primitive!r} must be one of {', '.join(PRIMITIVES)}")
    _registry.setdefault(primitive, {}).update({each.name: each for each in implementations})


@contextlib.contextmanager
def targeting(device: jax.Device) -> Iterator[None]:
    """Implementations are chosen for `device`, which need not be here.

    A function that is already traced keeps its choice, so this is for code that traces anew.
    """
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def target_device() -> jax.Device:
    """What implementations are chosen for: the device that is `targeting`, or JAX's default."""
    return _target.get() or jax.devices()[0]


def _choose(primitive: str, device: jax.Device, operands: tuple) -> tuple[Implementation, str]:
    reasons = [f"the first that runs on {device.platform}"]
    for name in PREFERENCE:
        implementation = _registry[primitive].get(name)
        if implementation is None:
            continue
        why_not = implementation.why_not(device, operands)
        if why_not is None:
            return implementation, "; ".join(reasons)
        reasons.append(f"not {name}: {why_not}")
    why = "; ".join(reasons[1:])
    raise RuntimeError(f"{primitive} has no implementation for {device.platform}: {why}")


def _named(primitive: str, name: str, device: jax.Device, operands: tuple) -> Implementation:
    implementations = _registry[primitive]
    known = [each for each in PREFERENCE if each in implementations]
    runnable = [each for each in known if implementations[each].why_not(device, operands) is None]
    if name not in implementations:
        problem = f"is not an implementation of {primitive}"
    elif name not in runnable:
        why_not = implementations[name].why_not(device, operands)
        problem = f"cannot run {primitive} on {device.platform}: {why_not}"
    else:
        return implementations[name]
    raise ValueError(f"implementation={name!r} {problem}; use {', '.join(runnable)} or None")


def select(primitive: str, implementation: str | None, *operands) -> Callable:
    """The function that computes `primitive`, of the implementation that `chosen` returns."""
    return chosen(primitive, implementation, *operands).function


def chosen(primitive: str, implementation: str | None, *operands) -> Implementation:
    """By what `primitive` is computed on JAX's default device, or the one targeted.

    Which one it is, and why, is logged the first time.

    Args:
      primitive: one of PRIMITIVES, already registered.
      implementation: a name, or None for the best that can run.
      *operands: what its function will be called with.

    Raises:
      ValueError: if the named implementation does not exist, or cannot run here or take these.
    """
    device = target_device()
    if implementation is None:
        found, reason = _choose(primitive, device, operands)
    else:
        found, reason = _named(primitive, implementation, device, operands), "asked for by name"
    message = f"{primitive}: {found.name} ({reason})"
    if message not in _logged:
        _logged.add(message)
        logger.info("%s", message)
    return found


def explain() -> list[tuple[str, str, str]]:
    """(primitive, implementation, reason) of what `select` takes here without a name.

    Operands may still rule it out; `select` then logs why.
    """
    device = target_device()
    rows = []
    for primitive in PRIMITIVES:
        importlib.import_module(f"pallas_kernels.{primitive}")
        chosen, reason = _choose(primitive, device, ())
        rows.append((primitive, chosen.name, reason))
    return rows
