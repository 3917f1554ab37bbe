"""Names in the rows of attention benchmarks; light to import."""

from typing import Literal, get_args

Part = Literal["op", "scoring", "selection", "rotary", "local", "landmarks", "dynamic", "fusion"]
Direction = Literal["forward", "forward_backward"]
Selection = Literal["random", "correlated"]
PARTS: tuple[Part, ...] = get_args(Part)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
