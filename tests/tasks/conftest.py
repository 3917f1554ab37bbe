"""A small folder of text, so that tests neither read nor tokenise the standard library."""

import numpy as np
import pytest

from sparsex_jax.tasks import Corpus, load


@pytest.fixture(scope="session")
def tokenizer():
    return load()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    names = ["alpha", "beta", "gamma", "delta", "count", "value", "result"]
    for number in range(40):
        lines = []
        for _ in range(60):
            left, middle, right = rng.choice(names, 3)
            lines.append(f"    {left} = {middle} + {right}({rng.integers(100)})")
        (root / f"file_{number}.py").write_text("\n".join(["def f():", *lines]) + "\n")
    return root


@pytest.fixture(scope="session")
def haystack(folder, tokenizer):
    return Corpus(folder, tokenizer=tokenizer).tokens(20_000)
