"""Which tokens each layer computes where only the last tokens' outputs are wanted."""

from sparsex_jax.config import ModelConfig


def attending_tokens(config: ModelConfig, tokens: int, outputs: int) -> list[int]:
    """How many tokens of a sequence, the last ones, have to attend in each layer.

    Before a local layer those do that its windows and its convolution reach; what other layers
    attend to may lie anywhere. What is left out before a local layer is a whole number of blocks,
    so that its windows begin where they would in the whole sequence.

    Args:
      config: of the model.
      tokens: of the sequence.
      outputs: of these, whose hidden states are wanted.
    """
    size = config.attention.block_size
    reach = config.attention.window + size + config.conv_width
    counts = [outputs]
    for kind in reversed(config.layers[1:]):
        left_out = max(0, tokens - counts[0] - reach) // size * size if kind == "l" else 0
        counts.insert(0, tokens - left_out)
    return counts
