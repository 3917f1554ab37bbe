"""Where the keys and values of old blocks are kept.

A tier is a class with the methods of `DeviceRemote`: `empty`, `append`, `landmarks`, `attend`,
`split`, `join`.
"""

from typing import Literal, get_args

from sparsex_jax.cache.compressed import CompressedRemote
from sparsex_jax.cache.device import DeviceRemote
from sparsex_jax.cache.host import HostRemote
from sparsex_jax.config import ModelConfig, baselines_in

Tier = Literal["device", "host", "compressed"]
TIERS: tuple[Tier, ...] = get_args(Tier)
EXACT: tuple[Tier, ...] = ("device", "host")
Remote = DeviceRemote | HostRemote | CompressedRemote
_CLASSES: dict[Tier, type[Remote]] = {
    "device": DeviceRemote,
    "host": HostRemote,
    "compressed": CompressedRemote,
}


def empty_remote(
    tier: Tier, config: ModelConfig, batch_size: int, capacity: int, chunk: int
) -> Remote:
    """The remote past of a sparse layer, without tokens."""
    return _CLASSES[tier].empty(config, batch_size, capacity, chunk)


def why_not_in(tier: Tier, config: ModelConfig) -> str | None:
    """Why a model has no cache in a tier; None where it has one."""
    baselines = baselines_in(config.layers)
    if baselines and tier != "device":
        return f"tier={tier!r} is for sparse layers, and this model has {baselines} ones"
    if tier == "compressed" and config.attention.recency:
        return "tier='compressed' selects no blocks, and this model has a recency of them"
    return None
