"""`sparsex train`."""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from sparsex_jax.commands.arguments import parse
from sparsex_jax.config import ConfigError, TrainConfig
from sparsex_jax.parallel.distributed import DistributedConfig, processes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a model, or goes on where its run directory stands.

    Each field of the preset's TrainConfig is an option, too: --model.attention.top-k 8.
    SIGTERM, Ctrl-C and --max-minutes end the current step, save and exit with status 0; the same
    command goes on from there.

    Attributes:
      preset: a Python file that defines `config`, a TrainConfig (see configs/).
      run_dir: directory of the run: checkpoints, metrics, and at the end the model.
      max_minutes: minutes after which to save and stop.
      distributed: the processes that train together (docs/launching.md).
      config: the preset's.
    """

    preset: tyro.conf.Positional[Path]
    run_dir: Path
    max_minutes: float | None = None
    distributed: Annotated[DistributedConfig, tyro.conf.arg(name="")] = DistributedConfig()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""

    def default(preset: Path, config: TrainConfig) -> Arguments:
        return Arguments(preset, Path("runs") / preset.stem, config=config)

    train(parse_with_preset(Arguments, "train", arguments, default))


def parse_with_preset[T](
    kind: type[T], command: str, arguments: list[str], default: Callable[[Path, TrainConfig], T]
) -> T:
    """Arguments of which the first is a preset, which has the other options' defaults.

    Args:
      kind: their dataclass.
      command: its name.
      arguments: as typed.
      default: from a preset and its config to the arguments that nobody has given.

    Raises:
      ConfigError: the first is no preset, or as `load_preset` and `parse`.
    """
    given = None
    if arguments and not arguments[0].startswith("-"):
        preset = Path(arguments[0])
        given = default(preset, load_preset(preset))
    elif not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"the first argument of {command} must be a preset: configs/nano.py, say")
    return parse(kind, command, arguments, given)


def load_preset(path: Path) -> TrainConfig:
    """The `config` of a Python file.

    Raises:
      FileNotFoundError: there is no such file.
      ConfigError: it does not run, or defines no config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"preset {path} is not a file: use one of configs/, say")
    try:
        config = runpy.run_path(str(path)).get("config")
    except ConfigError as error:
        raise ConfigError(f"preset {path}: {error}") from error
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(f"preset {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"preset {path} must define `config = TrainConfig(...)`")
    return config


def train(arguments: Arguments) -> None:
    """Runs the command."""
    import jax

    from sparsex_jax.training import train

    with processes(arguments.distributed):
        result = train(arguments.config, arguments.run_dir, max_minutes=arguments.max_minutes)
        if jax.process_index() == 0:
            print(result.message)
