"""Reading a context that many devices share."""

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsex_jax.config import ConfigError, ModelConfig, baselines_in
from sparsex_jax.modules.attention import Remembered
from sparsex_jax.parallel.mesh import batch_spec
from sparsex_jax.parallel.rules import partitions
from sparsex_jax.scoring import Blocks
from sparsex_jax.training.parameters import Skeleton


def make_prefill(
    skeleton: Skeleton,
    config: ModelConfig,
    mesh: Mesh | None,
    implementation: str | None = None,
    sequence_strategy: str = "auto",
) -> jax.stages.Wrapped:
    """Builds the compiled reading of whole contexts, for whoever keeps a cache on many devices.

    Args:
      skeleton: of a `Transformer`.
      config: its config.
      mesh: of `make_mesh`; contexts lie on it as a step's batches do.
      implementation: of the primitives; None picks by platform.
      sequence_strategy: as in `MeshConfig`.

    Returns:
      A jitted function (parameters by name, tokens int32 [B, N]) -> (logits after the last token,
      f32 [B, vocab], and for each layer what is `Remembered`, whole arrays whose parts stay where
      they were computed: N split along "seq", heads along "tensor").

    Raises:
      ConfigError: the model has layers of baselines.
    """
    if baselines_in(config.layers):
        raise ConfigError(
            f"layers={config.layers!r} has layers of baselines, whose past is on one device: use"
            " cache.Engine"
        )

    def read(params, tokens):
        model = skeleton.build(params)
        return model.prefill(
            tokens, implementation=implementation, sequence_strategy=sequence_strategy
        )

    if mesh is None:
        return jax.jit(read)
    _, batch, tokens = batch_spec(mesh)
    split, last, whole = P(batch, tokens, "tensor"), P(batch, None, "tensor"), P(batch)
    blocks = Blocks(split, split if config.attention.search_node_size else None)
    newest = whole if config.ngrams else None
    remembered = [
        Remembered(split, split, whole, newest, split, blocks)
        if kind == "s"
        else Remembered(last, last, whole, None, None, None)
        for kind in config.layers
    ]

    def on_devices(params, context):
        specs = partitions(params, skeleton.axes, mesh.shape)
        return jax.shard_map(
            read,
            mesh=mesh,
            in_specs=(specs, P(batch, tokens)),
            out_specs=(whole, remembered),
        )(params, context)

    return jax.jit(on_devices)
