"""Files and lines of a context's tokens."""

import numpy as np
import pytest

from sparsex_jax.cache.sources import Place, Sources
from sparsex_jax.cache.store import CacheError

NEWLINES = np.array([0, 0, 1, 2])  # of the tokens 0 to 3
FILES = [("a.c", np.array([0, 2, 1, 1, 3, 0])), ("b.c", np.array([1, 2, 2, 0, *[2] * 20, 1]))]


@pytest.fixture
def sources():
    return Sources.of(FILES, NEWLINES)


def test_lines_of_tokens(sources):
    assert sources.lines[:6].tolist() == [1, 1, 2, 2, 2, 4]
    assert sources.lines[6:10].tolist() == [1, 1, 2, 3]
    assert sources.begins.tolist() == [0, 6]


def test_places_with_the_most_attention(sources, tmp_path):
    attention = np.zeros(len(sources.lines), np.float32)
    attention[[2, 3, 5]] = 0.2, 0.1, 0.1  # lines 2 and 4 of a.c
    attention[[6, 30]] = 0.5, 0.08  # lines 1 and 23 of b.c
    attention[15] = 0.02  # too little to count
    sources.save(tmp_path)
    for known in (sources, Sources.load(tmp_path)):
        places = known.places(attention, 3)
        assert [place[:3] for place in places] == [("b.c", 1, 1), ("a.c", 2, 4), ("b.c", 23, 23)]
        np.testing.assert_allclose([place.share for place in places], [0.5, 0.4, 0.08], rtol=1e-6)
        assert known.places(attention, 1) == places[:1]
        assert known.places(0 * attention, 3) == []
    assert str(Place("a.c", 2, 4, 0.4)) == "a.c:2-4 (40%)"
    assert str(Place("b.c", 1, 1, 0.5)) == "b.c:1 (50%)"


def test_what_is_missing_is_told(sources, tmp_path):
    with pytest.raises(CacheError, match="use --sources 0, or run the same"):
        Sources.load(tmp_path)
    sources.save(tmp_path)
    (tmp_path / "lines.npy").write_bytes(b"")
    with pytest.raises(CacheError, match="run the same `sparsex ingest` once more"):
        Sources.load(tmp_path)
