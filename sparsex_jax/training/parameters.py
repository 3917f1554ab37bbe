"""Parameters of an nnx model as a flat dictionary: what is optimised, saved and restored."""

import dataclasses
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its parameters.

    Attributes:
      model_class: the model's.
      graphdef: of flax, and so `treedef` and `rest`.
      names: of the parameters.
      axes: logical names of each parameter's axes, by its name; none where it has none.
    """

    model_class: type
    graphdef: Any
    names: tuple[str, ...]
    axes: dict[str, tuple[str | None, ...]]
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
    variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    axes = {
        name: tuple(variable.get_metadata().get("axis_names", ()))
        for name, variable in zip(names, variables, strict=True)
    }
    skeleton = Skeleton(type(model), graphdef, names, axes, treedef, rest)
    return skeleton, dict(zip(names, arrays, strict=True))
