"""Which tokens each layer computes where only the last tokens' outputs are wanted."""

from collections.abc import Callable

from sparsex_jax.config import ModelConfig


def count_attending(
    config: ModelConfig, tokens: int, outputs: int, inputs_of_local: Callable[[int], int]
) -> list[int]:
    """How many of so many tokens, the last ones, attend in each layer, if `outputs` do in the last.

    What layers that are not local attend to may lie anywhere, so before them all tokens do.

    Args:
      config: of the model.
      tokens: there are.
      outputs: of these, whose hidden states are wanted.
      inputs_of_local: from the tokens that attend in a local layer to those that have to before it.
    """
    counts = [outputs]
    for kind in reversed(config.layers[1:]):
        needed = inputs_of_local(counts[0]) if kind == "l" else tokens
        counts.insert(0, min(needed, tokens))
    return counts


def attending_for_loss(config: ModelConfig, tokens: int, outputs: int) -> list[int]:
    """`count_attending` of a whole sequence in training.

    What is left out before a local layer is a whole number of blocks, so that its windows begin
    where they would in the whole sequence.
    """
    size = config.attention.block_size
    reach = config.attention.window + size + config.conv_reach

    def inputs_of_local(attending: int) -> int:
        return tokens - max(0, tokens - attending - reach) // size * size

    return count_attending(config, tokens, outputs, inputs_of_local)
