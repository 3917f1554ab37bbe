"""Text as tokens: splits, laziness, the cache, and folders that do not serve."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from sparsex_jax.tasks import Corpus, corpus, load
from sparsex_jax.tasks import tokenizer as tokenizer_module


def test_tokenizer_round_trip_and_digits(tokenizer):
    text = "def f(x):\n\n\treturn x + 1234567  # naïve – ☃\n"
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer.encode("1234567")) == 7
    assert tokenizer.vocab_size == 4096
    assert not set(tokens) & {tokenizer.pad_id, tokenizer.end_id}
    assert {tokenizer.end_id, tokenizer.newline_id} <= set(tokenizer.stop_ids)
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint
    assert tokenizer_module.DEFAULT_PATH.stat().st_size < 1 << 20


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json' cannot be read"):
        load(tmp_path / "bad.json")


def test_splits_cover_the_folder_without_overlap(folder, tokenizer):
    names = {split: set(corpus.find_files(folder, split)) for split in ("train", "held_out", None)}
    assert names["train"] | names["held_out"] == names[None]
    assert not names["train"] & names["held_out"]
    assert 0 < len(names["held_out"]) < len(names["train"])


def test_tokens_are_lazy_deterministic_and_go_round(folder, tokenizer, monkeypatch):
    text = Corpus(folder, tokenizer=tokenizer)
    read = []
    chunks = corpus.read_chunks
    monkeypatch.setattr(corpus, "read_chunks", lambda path: read.append(path) or chunks(path))
    monkeypatch.setattr(corpus, "_BATCH_CHUNKS", 1)
    few = text.tokens(100, seed=1)
    assert few.dtype == np.int32
    assert len(read) == 1
    np.testing.assert_array_equal(few, text.tokens(100, seed=1))
    assert not np.array_equal(few, text.tokens(100, seed=2))
    everything = text.tokens(1 << 20)
    whole = text.all_tokens()
    assert len(everything) == 1 << 20 > len(whole)
    np.testing.assert_array_equal(everything[: len(whole)], whole)
    np.testing.assert_array_equal(everything[len(whole) : 2 * len(whole)], whole)


def test_all_tokens_are_kept_on_disk(folder, tokenizer, monkeypatch):
    first = Corpus(folder, tokenizer=tokenizer).all_tokens()
    [path] = corpus.cache_folder().iterdir()
    assert first.dtype == np.uint16
    monkeypatch.setattr(corpus, "read_chunks", None)
    again = Corpus(folder, tokenizer=tokenizer)
    assert isinstance(again.all_tokens(), np.memmap)
    np.testing.assert_array_equal(again.all_tokens(), first)
    assert len(pickle.dumps(again)) < path.stat().st_size + len(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again)).all_tokens(), first)


def test_a_damaged_cache_is_made_again(folder, tokenizer):
    first = np.array(Corpus(folder, tokenizer=tokenizer).all_tokens())
    [path] = corpus.cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(Corpus(folder, tokenizer=tokenizer).all_tokens(), first)


def test_changed_text_is_read_again(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\n")
    assert tokenizer.decode(Corpus(tmp_path, tokenizer=tokenizer).all_tokens()) == "one\n"
    (tmp_path / "a.txt").write_text("other words\n")
    assert tokenizer.decode(Corpus(tmp_path, tokenizer=tokenizer).all_tokens()) == "other words\n"


def test_goes_on_without_a_cache(folder, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(Corpus(folder, tokenizer=tokenizer).all_tokens())


def test_goes_on_when_the_disk_is_full(folder, tokenizer, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(Corpus(folder, tokenizer=tokenizer).all_tokens())
    assert not list(corpus.cache_folder().iterdir())


def test_files_that_are_no_text_are_left_out(tmp_path, tokenizer):
    (tmp_path / "a.bin").write_bytes(b"abc\0def")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "c.txt").write_text("kept")
    assert tokenizer.decode(Corpus(tmp_path, tokenizer=tokenizer).all_tokens()) == "kept\n"


def test_folders_that_do_not_serve(tmp_path, tokenizer):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="missing' must be a folder .* give another folder"):
        Corpus(missing, tokenizer=tokenizer)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty' must hold text files"):
        Corpus(empty, tokenizer=tokenizer)
    (empty / "a.bin").write_bytes(b"\0\1")
    (empty / "b.txt").write_text("")
    for read in (lambda text: text.tokens(10), lambda text: text.all_tokens()):
        with pytest.raises(ValueError, match="empty' must hold text files"):
            read(Corpus(empty, tokenizer=tokenizer))
    with pytest.raises(FileNotFoundError, match="must be a folder that can be read"):
        Corpus(empty / "b.txt", tokenizer=tokenizer)


def test_a_folder_without_permission(tmp_path, tokenizer, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(FileNotFoundError, match="Permission denied"):
        Corpus(tmp_path, tokenizer=tokenizer)


def test_the_default_is_the_standard_library(tokenizer):
    text = Corpus(tokenizer=tokenizer)
    assert text.folder == pathlib.Path(os.__file__).parent
    assert "os.py" in text.files
    assert not any("site-packages" in name for name in text.files)
    assert all(name.endswith(".py") for name in text.files)
    assert len(text.tokens(2000)) == 2000
