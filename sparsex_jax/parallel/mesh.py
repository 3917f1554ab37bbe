"""Meshes of devices: their axes, and which sizes of these fit a model and its sequences."""

import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sparsex_jax.config import (
    AttentionConfig,
    ConfigError,
    MeshConfig,
    ModelConfig,
    baselines_in,
)

AXES = ("data", "fsdp", "seq", "tensor")
BATCH_AXES = ("data", "fsdp")  # along which sequences are split
TOKEN_AXES = (*BATCH_AXES, "seq")  # along which tokens are split


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The sizes of all axes for so many devices.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = {name: getattr(config, name) for name in AXES}
    left = [name for name, size in sizes.items() if size == -1]
    given = 1
    for size in sizes.values():
        given *= max(size, 1)
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if left and devices % given == 0:
        return sizes | {left[0]: devices // given}
    if given == devices:
        return sizes
    named = [name for name, size in sizes.items() if size > 1]
    rule = f"mesh {shown} must multiply to the {devices} devices"
    if left:
        rule = f"the axes of mesh {shown} must divide the {devices} devices"
    options = (f"{name}={_divisors(devices * sizes[name], given)}" for name in named)
    ways_out = [option for option in options if not option.endswith("=")]
    advice = " or ".join(ways_out) or f"fsdp={devices}"
    if not left:
        advice += ", or -1 for one axis"
    raise ConfigError(f"{rule}: use {advice}, or another number of devices")


def _divisors(devices: int, others: int) -> str:
    """The sizes that an axis may have: divisors of what the other axes leave to it."""
    if devices % others:
        return ""
    room = devices // others
    return " or ".join(str(n) for n in range(1, room + 1) if room % n == 0)


def make_mesh(config: MeshConfig | None = None, devices: list[Any] | None = None) -> Mesh | None:
    """The mesh of a config over devices, by default those of all processes; None for a single one.

    Its axes are AXES; neighbours along "tensor" are close to each other.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(MeshConfig() if config is None else config, len(devices))
    if len(devices) == 1:
        return None
    shape = tuple(sizes.values())
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_size(name: str) -> int:
    """Devices along an axis where the code is traced: 1 outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[name] if name in mesh.manual_axes else 1


def used(names: tuple[str, ...], sizes: dict[str, int] | None = None) -> tuple[str, ...]:
    """Those of the axes that have several devices, here or by their sizes."""
    return tuple(n for n in names if (axis_size(n) if sizes is None else sizes.get(n, 1)) > 1)


def batch_spec(mesh: Mesh) -> P:
    """How [parts, sequences, tokens] lie on a mesh."""
    sizes = dict(mesh.shape)
    return P(None, used(BATCH_AXES, sizes) or None, used(("seq",), sizes) or None)


def batch_share(mesh: Mesh | None) -> tuple[int, int]:
    """Which share of the sequences of a batch this process feeds: (number, shares).

    Processes that hold parts of the same sequences feed the same share.

    Raises:
      ConfigError: the shares of two processes overlap only in part.
    """
    if mesh is None:
        return 0, 1
    rows = [mesh.shape["data"], mesh.shape["fsdp"]]
    groups = mesh.devices.reshape(rows[0] * rows[1], -1)
    mine = [
        n for n, group in enumerate(groups)
        if any(device.process_index == jax.process_index() for device in group)
    ]  # fmt: skip
    first, count = mine[0], len(mine)
    if mine != list(range(first, first + count)) or first % count or len(groups) % count:
        raise ConfigError(
            f"mesh {dict(mesh.shape)} gives this process the groups {mine} of sequences, which are"
            " no equal share: use sizes of data and fsdp that the number of processes divides"
        )
    return first // count, len(groups) // count


def part_rules(attention: AttentionConfig, *, sparse: bool = True) -> tuple[int, str, int]:
    """What a device's part of a split sequence must fulfil.

    Its segments must be whole, for it makes their landmarks (without any, its blocks), and the
    window of the first token behind it must lie within it.

    Args:
      attention: of the layers.
      sparse: whether some of them have more than the local branch.

    Returns:
      What its tokens must be a multiple of, that field's name, and the fewest.
    """
    landmarks = sparse and attention.landmarks != "off"
    name = "segment_length" if landmarks else "block_size"
    return getattr(attention, name), name, attention.window + attention.block_size


def check_model(model: ModelConfig, mesh: Mesh | None) -> None:
    """Raises ConfigError unless a mesh can split the model: its axes divide the sizes."""
    if mesh is None:
        return
    baselines = baselines_in(model.layers)
    if baselines and mesh.shape["seq"] > 1:
        raise ConfigError(
            f"mesh.seq={mesh.shape['seq']} splits sequences, which {baselines} layers take whole:"
            " use mesh.seq=1"
        )
    split = used(("fsdp", "seq"), dict(mesh.shape))
    for axes, name in (
        (("tensor",), "num_kv_heads"),
        (("tensor",), "mlp_dim"),
        (split, "model_dim"),
    ):
        size, value = math.prod(mesh.shape[axis] for axis in axes), getattr(model, name)
        if value % size:
            sizes = " times ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            fitting = [n for n in range(1, size + 1) if value % n == 0]
            raise ConfigError(
                f"{sizes} must divide model.{name}={value}: use {' times '.join(axes)} of"
                f" {' or '.join(map(str, fitting))}, or {name}={-(-value // size) * size}"
            )


def check_batch(
    name: str,
    batch_size: int,
    length: int,
    accumulation: int,
    model: ModelConfig,
    mesh: Mesh | None,
) -> None:
    """Raises ConfigError unless sequences and their tokens can be split over a mesh.

    Args:
      name: of the stage, for the message.
      batch_size: sequences of a step.
      length: tokens of a sequence.
      accumulation: micro-batches of a step.
      model: whose attention restricts how tokens are split.
      mesh: of `make_mesh`.
    """
    if mesh is None:
        return
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = accumulation * groups
    if batch_size % unit:
        below = batch_size // unit * unit
        advice = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(
            f"{name}.batch_size={batch_size} must be a multiple of accumulation={accumulation}"
            f" times mesh.data={mesh.shape['data']} times mesh.fsdp={mesh.shape['fsdp']}: use"
            f" {advice}, or more devices along mesh.seq"
        )
    parts = mesh.shape["seq"]
    if parts == 1:
        return
    unit, field, least = part_rules(model.attention, sparse="s" in model.layers)
    if length % (parts * unit) or length < parts * least:
        fewest = -(-least // unit) * unit * parts
        below = max(length // (parts * unit) * parts * unit, fewest)
        lengths = sorted({below, max(below + parts * unit, fewest)})
        fitting = [
            n for n in range(1, parts) if length % (n * unit) == 0 and length >= n * least
        ] or [1]  # fmt: skip
        raise ConfigError(
            f"{name}.length={length} must be mesh.seq={parts} times a multiple of"
            f" {field}={unit}, and of at least window + block_size = {least}: use length"
            f" {' or '.join(map(str, lengths))}, or seq of {' or '.join(map(str, fitting))}"
        )
