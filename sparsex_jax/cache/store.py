"""A cache on disk: what was read once is asked about many times, and a killed prefill goes on.

A directory has cache.json (whose cache it is) and parts/, folders named by the tokens that they
hold: 0-65536, 65536-131072, ... Each is written under another name first, and has a manifest of its
files. In an exact tier a part holds what its own tokens left, so that each is written once, and a
cache of one exact tier may be loaded into the other; a compressed cache has one part with all.
"""

import functools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sparsex_jax import manifest
from sparsex_jax.cache.compressed import CompressedRemote
from sparsex_jax.cache.device import DeviceRemote, touched
from sparsex_jax.cache.engine import Cache, Engine
from sparsex_jax.cache.host import HostRemote
from sparsex_jax.cache.layer import LayerCache, Recent
from sparsex_jax.cache.tiers import EXACT, Tier
from sparsex_jax.config import ModelConfig, baselines_in
from sparsex_jax.errors import reading, writing
from sparsex_jax.modules.attention import KeySide
from sparsex_jax.scoring import Blocks

DESCRIPTION = "cache.json"
_PART = re.compile(r"(\d+)-(\d+)")
_FORMAT = 1


class CacheError(ValueError):
    """A cache cannot be written, read or used; the message names path, rule and way out."""


class CacheDirectory:
    """A cache on disk.

    Args:
      path: of the directory.
      fingerprint: what decides the numbers in a cache: model, weights, tokenizer, types; JSON.

    Attributes:
      tier: in which it was made, None before there is one.
      capacity: of the engine that made it, likewise.
      chunk: likewise.

    Raises:
      CacheError: the directory holds another model's cache, or something else.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: dict[str, Any]):
        self.path, self.fingerprint = Path(path), json.loads(json.dumps(fingerprint))
        self.tier: Tier | None = None
        self.capacity: int | None = None
        self.chunk: int | None = None
        if (self.path / DESCRIPTION).exists():
            self._read_description()
        elif self.path.exists() and (not self.path.is_dir() or os.listdir(self.path)):
            raise CacheError(f"{self.path} holds something that is no cache: use a new directory")

    def _read_description(self) -> None:
        with _reading(self.path):
            description = json.loads((self.path / DESCRIPTION).read_text())
            found, kind = description["fingerprint"], description["format"]
            self.tier, self.capacity = description["tier"], description["capacity"]
            self.chunk = description["chunk"]
        if kind != _FORMAT:
            raise CacheError(f"{self.path} has format {kind}, not {_FORMAT}: ingest it again")
        for name, wanted in self.fingerprint.items():
            if found.get(name) != wanted:
                raise CacheError(
                    f"{self.path} was made with another {name}: use the one that it was made with,"
                    " or ingest again into a new directory"
                )

    @property
    def exists(self) -> bool:
        """Whether there is a cache, complete or not."""
        return self.tier is not None

    @staticmethod
    def check_model(config: ModelConfig) -> None:
        """Raises CacheError where what the layers of a model remember cannot be kept on disk."""
        if baselines := baselines_in(config.layers):
            raise CacheError(
                f"caches of {baselines} layers cannot be kept on disk: use a model of local and"
                " sparse layers"
            )

    def parts(self) -> list[tuple[int, int]]:
        """First token, and the one behind the last, of the parts that follow one another from 0."""
        folder = self.path / "parts"
        names = os.listdir(folder) if folder.is_dir() else []
        found = [tuple(map(int, m.groups())) for m in map(_PART.fullmatch, names) if m]
        chain: list[tuple[int, int]] = []
        length = 0
        while following := [end for begin, end in found if begin == length]:
            chain.append((length, max(following)))
            length = chain[-1][1]
        return chain

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        chain = self.parts()
        return chain[-1][1] if chain else 0

    def save(self, engine: Engine, cache: Cache, tokens: np.ndarray) -> None:
        """Writes what is not yet there, atomically.

        Args:
          engine: of the cache; one sequence.
          cache: that has read all of `tokens`.
          tokens: int [N], the context, to recognise it by.

        Raises:
          CacheError: it cannot be written; what was there before is intact.
        """
        self.check_model(engine.config)
        if engine.batch_size != 1:
            raise CacheError(f"{self.path} takes one sequence: use batch_size=1")
        begin, end = self.length if engine.tier in EXACT else 0, cache.length
        if end <= self.length:
            return
        arrays = dict(_arrays(engine, cache, begin, end))
        with _writing(self.path):
            if not self.exists:
                self._describe(engine)
            folder = self.path / "parts"
            folder.mkdir(exist_ok=True)
            for left in folder.glob("*.tmp"):
                shutil.rmtree(left)
            fresh = folder / f"{begin}-{end}.tmp"
            with _checkpointer() as checkpointer:
                checkpointer.save(fresh.absolute() / "arrays", arrays)
            (fresh / "tokens").mkdir()
            (fresh / "tokens" / "crc32").write_text(str(_crc32(tokens[begin:end])))
            manifest.write(fresh)
            fresh.rename(folder / f"{begin}-{end}")
            if engine.tier not in EXACT:
                for other in folder.glob("0-*"):
                    if other.name != f"0-{end}":
                        shutil.rmtree(other)

    def _describe(self, engine: Engine) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.tier, self.capacity, self.chunk = engine.tier, engine.capacity, engine.chunk
        description = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "tier": self.tier,
            "capacity": self.capacity,
            "chunk": self.chunk,
        }
        fresh = self.path / f".{DESCRIPTION}.tmp"
        fresh.write_text(json.dumps(description, indent=1) + "\n")
        fresh.replace(self.path / DESCRIPTION)

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Raises CacheError unless the cache is of the first of these tokens."""
        for begin, end in self.parts():
            with _reading(self.path):
                crc32 = int((self._part(begin, end) / "tokens" / "crc32").read_text())
            if crc32 != _crc32(tokens[begin:end]):
                raise CacheError(
                    f"{self.path} was made from other text: use a new directory, or the files as"
                    " they were"
                )

    def load(self, engine: Engine, progress: Callable[[int], None] | None = None) -> Cache:
        """The cache, for an engine of one sequence.

        Args:
          engine: of the model that made it. From one exact tier to the other is allowed, with any
            capacity; a compressed cache needs the tier, capacity and chunk that it was made with.
          progress: called with the tokens loaded so far.

        Raises:
          CacheError: there is none, it is damaged, or not for this engine.
        """
        chain = self.parts()
        if not chain:
            raise CacheError(f"{self.path} holds no cache: run `sparsex ingest` first")
        self._check_engine(engine, chain[-1][1])
        cache = engine.empty()
        layers = list(cache.layers)
        for begin, end in chain:
            folder = self._part(begin, end)
            with _reading(self.path):
                manifest.verify(folder)
                with _checkpointer() as checkpointer:
                    arrays = checkpointer.restore(folder.absolute() / "arrays")
                for i, layer in enumerate(layers):
                    layers[i] = _restored(engine, layer, arrays, i, begin, end)
            if progress is not None:
                progress(end)
        cache.layers, cache.lengths = tuple(layers), np.array([chain[-1][1]], np.int64)
        return cache

    def _part(self, begin: int, end: int) -> Path:
        return self.path / "parts" / f"{begin}-{end}"

    def _check_engine(self, engine: Engine, length: int) -> None:
        if engine.batch_size != 1:
            raise CacheError(f"{self.path} is of one sequence: use batch_size=1")
        exact = self.tier in EXACT
        if exact != (engine.tier in EXACT):
            raise CacheError(
                f"{self.path} was made with tier={self.tier!r}, not {engine.tier!r}: use"
                f" {' or '.join(EXACT) if exact else self.tier}, or ingest again"
            )
        shape = engine.capacity, engine.chunk
        if not exact and shape != (self.capacity, self.chunk):
            raise CacheError(
                f"{self.path} was made with capacity={self.capacity}, chunk={self.chunk}: use these"
            )
        if length > engine.capacity:
            raise CacheError(f"{self.path} has {length} tokens: use a larger capacity")


def _arrays(engine: Engine, cache: Cache, begin: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
    """What tokens [begin, end) left in a cache, by name."""
    stores = iter(cache.stores)
    size = engine.config.attention.block_size
    for i, layer in enumerate(cache.layers):
        for name, x in layer.recent._asdict().items():
            if x is not None:
                yield f"{i}.recent.{name}", np.asarray(x)
        remote = layer.remote
        if isinstance(remote, CompressedRemote):
            for number, x in enumerate(jax.tree.leaves(remote)):
                yield f"{i}.state.{number}", np.asarray(x)
        elif isinstance(remote, DeviceRemote | HostRemote):
            yield f"{i}.salience", _rows(remote.salience, begin, end)
            for name, x in remote.blocks._asdict().items():
                if x is not None:
                    yield f"{i}.{name}", _rows(x, begin // size, -(-end // size))
            if isinstance(remote, HostRemote):
                store = next(stores)
                yield f"{i}.k", store.k[begin:end]
                yield f"{i}.v", store.v[begin:end]
            else:
                yield f"{i}.k", _rows(remote.k, begin, end)
                yield f"{i}.v", _rows(remote.v, begin, end)


def _rows(x: jax.Array, begin: int, end: int) -> np.ndarray:
    """x[0, begin:end], by a program for its number of rows."""
    return np.asarray(jax.lax.dynamic_slice_in_dim(x, begin, end - begin, axis=1)[0])


def _restored(
    engine: Engine, layer: LayerCache, arrays: dict[str, Any], number: int, begin: int, end: int
) -> LayerCache:
    """A layer's cache with the tokens [begin, end) of a part."""

    def named(prefix):
        return {
            name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)
        }

    found = {name: jnp.asarray(x) for name, x in named(f"{number}.recent.").items()}
    recent = Recent(**{name: found.get(name) for name in Recent._fields})
    remote = layer.remote
    if isinstance(remote, CompressedRemote):
        state = named(f"{number}.state.")
        leaves = [jnp.asarray(state[str(i)]) for i in range(len(state))]
        return LayerCache(recent, jax.tree.unflatten(jax.tree.structure(remote), leaves))
    if remote is None:
        return LayerCache(recent, None)
    size, chunk = engine.config.attention.block_size, engine.chunk
    tokens = [arrays[f"{number}.{x}"] for x in ("k", "v", "salience")]
    blocks = Blocks(arrays[f"{number}.features"], arrays.get(f"{number}.mass"))
    for first in range(begin, end, chunk):
        valid = min(chunk, end - first)
        rows = [_filled(x[first - begin :], valid, chunk) for x in tokens]
        block, most = first // size - begin // size, touched(chunk, size)
        new = Blocks(
            *(None if x is None else _filled(x[block:], len(x) - block, most) for x in blocks)
        )
        remote = _append(
            remote, *rows, new, jnp.int32(first), jnp.int32(valid),
            config=engine.config.attention,
        )  # fmt: skip
    return LayerCache(recent, remote)


def _filled(x: np.ndarray, count: int, size: int) -> np.ndarray:
    """The first `count` rows, at most `size`, and zeros: [1, size, ...]."""
    rows = np.zeros((1, size, *x.shape[1:]), x.dtype)
    count = min(count, size)
    rows[0, :count] = x[:count]
    return rows


@functools.partial(jax.jit, donate_argnums=0, static_argnames="config")
def _append(remote, k, v, salience, blocks, length, valid, config):
    keys = KeySide(k, v, salience, None, None)
    return remote.append(keys, blocks, length, valid, config, True)


def _crc32(tokens: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tokens, np.int32).view(np.uint8))


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _writing(path: Path):
    way_out = "What was there before is intact: free some space and run the same command again"
    return writing(CacheError, str(path), way_out)


def _reading(path: Path):
    return reading(CacheError, path, "copy it again from where it came, or ingest again")
