"""Parameters of an nnx model as a flat dictionary: what is optimised, saved and restored."""

import dataclasses
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its parameters."""

    graphdef: Any
    names: tuple[str, ...]
    treedef: Any
    rest: Any

    def build(self, params: dict[str, jax.Array]) -> Any:
        """The model with the given parameters (traced ones, too)."""
        state = jax.tree.unflatten(self.treedef, [params[name] for name in self.names])
        return nnx.merge(self.graphdef, state, self.rest)


def split_model(model: nnx.Module) -> tuple[Skeleton, dict[str, jax.Array]]:
    """Splits a model into its skeleton and its parameters.

    Args:
      model: any nnx module; whatever is not an `nnx.Param` stays in the skeleton, as a constant.

    Returns:
      The skeleton, and the arrays by dotted name ("blocks.0.mlp.up.kernel").
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    # The last key of a path leads from the variable to its value.
    names = tuple(".".join(str(key.key) for key in path[:-1]) for path, _ in leaves)
    arrays = (value for _, value in leaves)
    return Skeleton(graphdef, names, treedef, rest), dict(zip(names, arrays, strict=True))
