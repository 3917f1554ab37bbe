"""Caches on disk: as in memory, gone on with after a kill, refused where they are wrong."""

import shutil

import jax
import numpy as np
import pytest

from sparsex_jax.cache import store
from sparsex_jax.cache.store import CacheDirectory, CacheError
from tests.cache.test_tiers import engine
from tests.modules.test_transformer import make_tokens

MODEL = {"model": {"layers": "sl"}, "weights": 7, "tokenizer": "abc"}
TOKENS = make_tokens(1, 140)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three parts, saved while a context is read, and what the model answers in the end."""
    path = tmp_path_factory.mktemp("caches") / "device"
    used, cache = engine("device"), None
    for begin, end in ((0, 48), (48, 110), (110, 130)):
        cache = used.prefill(TOKENS[:, begin:end], cache=cache)
        CacheDirectory(path, MODEL).save(used, cache, TOKENS[0])
    return path, used.answer(cache, TOKENS[:, 130:], 8)


def answer(path, tier):
    cache = CacheDirectory(path, MODEL).load(engine(tier))
    return engine(tier).answer(cache, TOKENS[:, 130:], 8)


def test_loaded_caches_answer_alike_in_both_exact_tiers(saved):
    path, expected = saved
    assert CacheDirectory(path, MODEL).parts() == [(0, 48), (48, 110), (110, 130)]
    for tier in ("device", "host"):
        np.testing.assert_array_equal(answer(path, tier), expected)


@pytest.mark.parametrize("tier", ["device", pytest.param("compressed", marks=pytest.mark.long)])
def test_a_killed_prefill_goes_on_as_if_nothing_had_been(tier, tmp_path, monkeypatch):
    used = engine(tier)
    whole = used.prefill(TOKENS[:, 70:130], cache=used.prefill(TOKENS[:, :70]))
    directory = CacheDirectory(tmp_path / "cache", MODEL)
    cache = used.prefill(TOKENS[:, :70])
    directory.save(used, cache, TOKENS[0])
    cache = used.prefill(TOKENS[:, 70:100], cache=cache)
    with monkeypatch.context() as patch:  # killed before the part has its name
        patch.setattr(store.manifest, "write", lambda folder: 1 / 0)
        with pytest.raises(CacheError, match="What was there before is intact"):
            directory.save(used, cache, TOKENS[0])
    directory = CacheDirectory(tmp_path / "cache", MODEL)
    assert directory.length == 70
    directory.check_tokens(TOKENS[0])
    cache = used.prefill(TOKENS[:, 70:130], cache=directory.load(used))
    directory.save(used, cache, TOKENS[0])
    assert not list((tmp_path / "cache" / "parts").glob("*.tmp")) and directory.length == 130
    for found in (cache, CacheDirectory(tmp_path / "cache", MODEL).load(used)):
        for kept, wanted in zip(found.layers, whole.layers, strict=True):
            pairs = [(kept.recent, wanted.recent)]
            if tier == "compressed" and wanted.remote is not None:
                pairs += [(kept.remote.slots, wanted.remote.slots), (kept.remote[:4],
                          wanted.remote[:4])]  # fmt: skip
            for a, b in zip(*map(jax.tree.leaves, zip(*pairs, strict=True)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        if tier == "device":
            expected = used.answer(whole, TOKENS[:, 130:], 8)
            np.testing.assert_array_equal(used.answer(found, TOKENS[:, 130:], 8), expected)


def test_foreign_caches_are_refused_in_one_line(saved, tmp_path):
    path, _ = saved
    for name in MODEL:
        with pytest.raises(CacheError, match=f"was made with another {name}: use") as raised:
            CacheDirectory(path, {**MODEL, name: "other"})
        assert "\n" not in str(raised.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds something that is no cache"):
        CacheDirectory(tmp_path, MODEL)
    with pytest.raises(CacheError, match="was made from other text"):
        CacheDirectory(path, MODEL).check_tokens(TOKENS[0, ::-1])
    with pytest.raises(CacheError, match="tier='device', not 'compressed': use device or host"):
        CacheDirectory(path, MODEL).load(engine("compressed"))
    with pytest.raises(CacheError, match="holds no cache"):
        CacheDirectory(tmp_path / "nothing", MODEL).load(engine("device"))


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "no description"])
def test_damaged_caches_are_refused_in_one_line(damage, saved, tmp_path):
    path = shutil.copytree(saved[0], tmp_path / "copy")
    file = max((path / "parts" / "48-110").rglob("*"), key=lambda x: x.stat().st_size * x.is_file())
    content = file.read_bytes()
    if damage == "altered":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (path / store.DESCRIPTION).write_text("{")
    with pytest.raises(CacheError, match="cannot be read, files are missing or damaged") as raised:
        answer(path, "device")
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
