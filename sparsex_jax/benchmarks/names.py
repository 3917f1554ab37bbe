"""Names in the rows of benchmarks; light to import."""

from typing import Literal, get_args

Part = Literal[
    "op", "scoring", "selection", "selection_in_nodes", "rotary", "local", "landmarks", "dynamic",
    "fusion",
]  # fmt: skip
DecodePart = Literal["op", "selection", "local", "landmarks", "dynamic", "writing"]
Direction = Literal["forward", "forward_backward"]
Selection = Literal["random", "correlated"]
Logits = Literal["normal", "peaked", "large"]
Precision = Literal["f32", "f32_merged", "f32_summed", "bf16"]
Strategy = Literal["ring", "dispatch"]
PARTS: tuple[Part, ...] = get_args(Part)
DECODE_PARTS: tuple[DecodePart, ...] = get_args(DecodePart)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
LOGITS: tuple[Logits, ...] = get_args(Logits)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
