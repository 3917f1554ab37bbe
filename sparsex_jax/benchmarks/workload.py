"""The shapes of a measurement, and random inputs of these shapes, made on the device."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import select_blocks
from sparsex_jax.benchmarks.names import Selection
from sparsex_jax.config import AttentionConfig, ConfigError, check_seed
from sparsex_jax.scoring import Blocks, node_features, rms_normalize
from sparsex_jax.spans import remote_end

# Part of the key of each input, so that all parts of a length see the same q, say.
NAMES = (
    "q", "k", "v", "salience", "anchors", "block_features", "landmark_gate", "dynamic_gate",
    "local_out", "landmark_out", "dynamic_out", "cotangent",
)  # fmt: skip
WANTED_OVERLAP = 0.8  # of neighbouring tokens' blocks, as reported for trained models
OVERLAP_PAIRS = 128
LONGEST_STRETCH = 256
NODE_SIZE, BEAM = 8, 32  # of the search in two levels
FLOATS_PER_CHUNK = 2**26  # of random numbers made at a time


@dataclasses.dataclass(frozen=True)
class Workload:
    """One sequence (B = 1) in bfloat16, with the attention's default config unless given.

    Attributes:
      tokens: T, a multiple of the block size, and at least twice the window.
      query_heads: Hq, a multiple of `kv_heads`.
      kv_heads: Hkv.
      head_dim: D, even.
      config: of the attention.
      selection: "random", or "correlated": neighbours share WANTED_OVERLAP of their blocks.
      implementation: of the primitives, as in `pallas_kernels`.
      seed: decides all numbers.
    """

    tokens: int
    query_heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    config: AttentionConfig = AttentionConfig()
    selection: Selection = "random"
    implementation: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("query_heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value} must be positive: use at least 1")
        if self.query_heads % self.kv_heads:
            raise ConfigError(
                f"query_heads={self.query_heads} must be a multiple of kv_heads={self.kv_heads}:"
                f" use {self.kv_heads}, say"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd: RoPE turns pairs, use an even one")
        block, least = self.config.block_size, 2 * self.config.window
        if self.tokens % block or self.tokens < least:
            raise ConfigError(
                f"length={self.tokens} must be a multiple of {block} and at least {least}: use"
                f" {max(least, self.tokens // block * block)}"
            )
        check_seed(self.seed)

    @property
    def groups(self) -> int:
        """G, query heads of a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def blocks(self) -> int:
        """Key blocks, T / S."""
        return self.tokens // self.config.block_size

    def spec(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and type of an input."""
        tokens, width = self.tokens, self.config.score_dim
        queries = (tokens, self.query_heads, self.head_dim)
        keys = (tokens, self.kv_heads, self.head_dim)
        chosen = (tokens, self.kv_heads, self.config.top_k)
        half, wide = jnp.bfloat16, jnp.float32
        shape, dtype = {
            "q": (queries, half),
            "k": (keys, half),
            "v": (keys, half),
            "salience": ((tokens, self.kv_heads), wide),
            "anchors": ((tokens + self.config.block_size, self.kv_heads, width), half),
            "query_features": ((tokens, self.kv_heads, width), half),
            "block_features": ((self.blocks, self.kv_heads, width), half),
            "nodes": ((self.blocks // NODE_SIZE, self.kv_heads, width), half),
            "landmark_gate": ((tokens, self.query_heads), wide),
            "dynamic_gate": ((tokens, self.query_heads), wide),
            "index": (chosen, jnp.int32),
            "score": (chosen, wide),
            "local_out": (queries, half),
            "landmark_out": (queries, half),
            "dynamic_out": (queries, half),
        }[name]
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    def make(self, names: Iterable[str]) -> dict[str, jax.Array]:
        """Inputs, [1, ...], on the device; nothing else stays there.

        Args:
          names: of `spec`. q, k, v and outputs of branches are normally distributed; features have
            RMS 1 (times 1 / sqrt(d_s) for queries), and those of nodes have the direction of their
            blocks' mean; gates lie in [0, 2). index and score are what the features select.
        """
        made = {}
        for name in names:
            if name in ("index", "score"):
                if name not in made:
                    made["index"], made["score"] = self._select()
            elif name == "query_features":
                made[name] = self.query_features()
            elif name == "block_features":
                made[name] = rms_normalize(self.random(name, self.spec(name)))
            elif name == "nodes":
                blocks = self.make(["block_features"])["block_features"]
                alike = Blocks(blocks, jnp.zeros(blocks.shape[:3], jnp.float32))
                config = dataclasses.replace(
                    self.config, search_node_size=NODE_SIZE, search_beam=BEAM
                )
                nodes = node_features(alike, config)
                assert nodes is not None
                made[name] = nodes
            elif name in ("landmark_gate", "dynamic_gate"):
                made[name] = 2 * jax.nn.sigmoid(self.random(name, self.spec(name)))
            else:
                made[name] = self.random(name, self.spec(name))
        return made

    def random(self, name: str, spec: jax.ShapeDtypeStruct, number: int = 0) -> jax.Array:
        """Normally distributed numbers of a shape and type.

        Args:
          name: one of NAMES, whose numbers these are.
          spec: what to make.
          number: tells several of the name apart.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), NAMES.index(name))
        return normal(jax.random.fold_in(key, number), spec.shape, spec.dtype)

    def query_features(self) -> jax.Array:
        """u, bfloat16 [1, T, Hkv, d_s]; see `stretch`."""
        anchors = self.random("anchors", self.spec("anchors"))
        return _all_features(anchors, jnp.int32(self.stretch), self.tokens)

    @functools.cached_property
    def stretch(self) -> int:
        """Tokens from one independent query feature to the next.

        Features between two such anchors turn from the one to the other: neighbours are the more
        alike, the longer the stretch. 1 makes all independent; "correlated" takes the stretch with
        the overlap nearest WANTED_OVERLAP.
        """
        if self.selection == "random":
            return 1
        low, high = 1, LONGEST_STRETCH
        while high - low > 1:
            middle = (low + high) // 2
            found = self._overlap(middle)
            if found is None:
                return 1
            low, high = (middle, high) if found < WANTED_OVERLAP else (low, middle)
        return min((low, high), key=lambda x: abs((self._overlap(x) or 0) - WANTED_OVERLAP))

    @functools.cached_property
    def overlap(self) -> float | None:
        """Share of a token's K blocks that the next token selects, too.

        The mean over a sample of tokens that have more than K blocks to select from, and over KV
        heads; None where no token has.
        """
        return self._overlap(self.stretch)

    def _overlap(self, stretch: int) -> float | None:
        first = self.config.top_k * self.config.block_size + self.config.window
        first += self.config.block_size
        if not self.config.top_k or first + 1 >= self.tokens:
            return None
        anchors = self.random("anchors", self.spec("anchors"))
        blocks = self.make(["block_features"])["block_features"]
        count = min(OVERLAP_PAIRS, self.tokens - 1 - first)
        tokens = first + jnp.arange(count, dtype=jnp.int32) * ((self.tokens - 1 - first) // count)
        shared = _shared_blocks(anchors, blocks, tokens, jnp.int32(stretch), self.config)
        return float(shared)

    def _select(self) -> tuple[jax.Array, jax.Array]:
        made = self.make(["query_features", "block_features"])
        positions = jnp.arange(self.tokens, dtype=jnp.int32)
        limit = remote_end(positions, 0, self.config) // self.config.block_size
        select = jax.jit(select_blocks, static_argnums=3, static_argnames="implementation")
        return select(
            made["query_features"], made["block_features"], limit, self.config.top_k,
            implementation=self.implementation,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Normal numbers [1, tokens, ...], made chunk by chunk: their bits never fill the memory."""
    tokens, rest = shape[1], shape[2:]
    most = max(1, FLOATS_PER_CHUNK // math.prod(rest))
    size = next(x for x in range(min(most, tokens), 0, -1) if tokens % x == 0)

    def chunk(number):
        numbers = jax.random.normal(jax.random.fold_in(key, number), (size, *rest), jnp.float32)
        return numbers.astype(dtype)

    return jax.lax.map(chunk, jnp.arange(tokens // size)).reshape(shape)


def _features_at(anchors: jax.Array, tokens: jax.Array, stretch: jax.Array) -> jax.Array:
    """Query features of tokens, times 1 / sqrt(d_s).

    Args:
      anchors: [1, more than T / stretch + 1, Hkv, d_s].
      tokens: int32 [n].
      stretch: int32, tokens between anchors.

    Returns:
      [1, n, Hkv, d_s].
    """
    place, rest = tokens // stretch, tokens % stretch
    angle = (rest.astype(jnp.float32) * (math.pi / 2) / stretch)[:, None, None]
    before, after = (anchors[:, place + i].astype(jnp.float32) for i in (0, 1))
    mixed = rms_normalize(jnp.cos(angle) * before + jnp.sin(angle) * after)
    return (mixed * anchors.shape[-1] ** -0.5).astype(anchors.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _all_features(anchors: jax.Array, stretch: jax.Array, count: int) -> jax.Array:
    return _features_at(anchors, jnp.arange(count, dtype=jnp.int32), stretch)


@functools.partial(jax.jit, static_argnums=4)
def _shared_blocks(
    anchors: jax.Array,
    blocks: jax.Array,
    tokens: jax.Array,
    stretch: jax.Array,
    config: AttentionConfig,
) -> jax.Array:
    """The mean share of the blocks selected by `tokens` [n] that the tokens after them select."""

    def select(tokens):
        features = _features_at(anchors, tokens, stretch)
        scores = jnp.einsum("bthd,bnhd->bthn", features, blocks, preferred_element_type=jnp.float32)
        limit = remote_end(tokens, 0, config) // config.block_size
        allowed = jnp.arange(blocks.shape[1]) < limit[:, None]
        return jax.lax.top_k(jnp.where(allowed[:, None], scores, -jnp.inf), config.top_k)[1]

    one, other = select(tokens), select(tokens + 1)
    return jnp.mean(jnp.any(one[..., :, None] == other[..., None, :], axis=-1))
