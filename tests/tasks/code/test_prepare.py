"""From sources to tokens and an index: spans, the split, the same bytes, and what goes wrong."""

import errno
import importlib.util
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest

from sparsex_jax.config import ConfigError
from sparsex_jax.tasks.code import duplicates
from sparsex_jax.tasks.code import prepare as module
from sparsex_jax.tasks.code.functions import describe, find_functions
from sparsex_jax.tasks.code.prepare import prepare
from sparsex_jax.tasks.code.prepared import SPLITS, PreparedCode
from tests.tasks.code.conftest import CONFIG, SOURCES


def test_functions_of_a_file():
    text = (SOURCES / "lib" / "ring.c").read_bytes()
    functions, calls = find_functions(text)
    names = [x.name.decode() for x in functions]
    # One line long is not Linux's style, and a macro's expansion is no definition of its name.
    assert names == ["ring_push", "ring_setup", "ring_new", "ring_pop", "ring_greet"]
    for x in functions:
        assert text[x.name_begin : x.name_end] == x.name
        assert text[x.begin - 1 : x.begin] == b"\n" and x.name in text[x.begin : x.body]
        assert text[x.body - 1 : x.body] == b"{" and text[x.end - 2 : x.end] == b"\n}"
    assert [x.doc is not None for x in functions] == [True, False, False, False, False]
    assert text[functions[0].doc :].startswith(b"/**\n * ring_push() - Put")
    called = [call.name.decode() for call in calls]
    assert {"malloc", "ring_setup", "ring_push", "ring_pop", "ring_check"} <= set(called)
    assert all(text[call.begin :].startswith(call.name) for call in calls)


def test_descriptions_do_not_name_the_function():
    text = (SOURCES / "lib" / "ring.c").read_bytes()
    function = find_functions(text)[0][0]
    found = describe(text[function.doc : function.begin].decode(), "ring_push")
    assert found == (
        "Put a number behind those that wait in a ring\n@ring: the ring, which must not be full\n"
        "@value: the number\nFUNCTION() wakes nobody; a reader has to look by itself.\n"
        "Return: how many numbers wait now."
    )


@pytest.mark.parametrize("split", SPLITS)
def test_spans_agree_with_the_text(split, prepared, tree):
    found, tokenizer = prepared.split(split), prepared.tokenizer
    assert len(found.functions) > 20
    for number, name in enumerate(found.files):
        part = found.tokens[found.bounds[number] : found.bounds[number + 1]]
        assert tokenizer.decode(part) == (tree / name).read_text()

    def text_of(begin, end):
        return tokenizer.decode(found.tokens[begin:end])

    for x in found.functions:
        raw, name = (tree / found.files[x["file"]]).read_bytes(), found.names[x["name"]]
        whole = raw[x["byte_begin"] : x["byte_end"]].decode()
        assert text_of(x["begin"], x["end"]) == whole
        lines = raw.decode().splitlines()[x["line_begin"] - 1 : x["line_end"]]
        assert "\n".join(lines) == whole
        assert text_of(x["name_begin"], x["name_end"]).lstrip(" ") == name
        assert text_of(x["begin"], x["body"]).endswith("{")
        if x["doc"] >= 0:
            assert text_of(x["doc"], x["begin"]).startswith(f"/**\n * {name}")
    for call in found.calls:
        assert found.names[call["name"]] in text_of(call["position"], call["position"] + 20)


def test_the_same_sources_give_the_same_bytes(tree, folder, tmp_path):
    with tarfile.open(tmp_path / "project.tar.xz", "w:xz") as tar:
        tar.add(tree, "project")
    prepare(tmp_path / "project.tar.xz", tmp_path / "again", CONFIG)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 14
    for path in files:
        assert (tmp_path / "again" / path).read_bytes() == (folder / path).read_bytes(), path


def test_near_duplicates_are_in_one_split(prepared):
    where = {name: split for split in SPLITS for name in prepared.split(split).files}
    assert where["scale.c"] == where["scale_again.c"]
    assert prepared.index["largest_cluster"] == 2 and len(where) == 14


def test_similarity_is_that_of_shingles():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in rng.integers(0, 10**6, 3000)]
    one = duplicates.signature(" ".join(words).encode())
    # Spaces do not count; 1000 other words at the end leave 2000 of 4000 shingles.
    assert (one == duplicates.signature("\n".join(words).encode())).all()
    half = [*words[:2000], *(f"other{i}" for i in range(1000))]
    estimate = (one == duplicates.signature(" ".join(half).encode())).mean()
    assert abs(estimate - 0.5) < 0.15
    other = duplicates.signature(" ".join(f"new{i}" for i in range(3000)).encode())
    assert (one == other).mean() < 0.05
    assert duplicates.clusters([one, other, one], 0.5).tolist() == [0, 1, 0]
    assert len(duplicates.signature(b"x")) == duplicates.BINS


def test_words_are_hashed_wherever_they_stand():
    found = duplicates._words(b"int a1_b = a1_b + 2;\n\tint")
    assert len(found) == 8
    assert found[0] == found[7] and found[1] == found[3]
    assert len(set(found.tolist())) == 6


def test_arrays_travel_by_their_path(prepared):
    split = prepared.split("train")
    again = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(again.tokens, split.tokens)
    assert len(pickle.dumps(split)) < 1000


@pytest.fixture
def fail(project, capsys, monkeypatch):
    """Runs the script, which must fail with one line."""
    path = project / "scripts" / "prepare_linux.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, script)
    spec.loader.exec_module(script)

    def fail(*arguments):
        assert script.main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("prepare_linux: ") and message.count("\n") == 1
        return message

    return fail


def test_bad_input_gives_one_line(fail, tree, tmp_path, monkeypatch):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    assert "does not exist: give a source tree" in fail(tmp_path / "none", "--out", out)
    assert "has no C files (.c, .h)" in fail(empty, "--out", out)
    (tmp_path / "text.tar").write_text("no archive")
    assert "is no tar file" in fail(tmp_path / "text.tar", "--out", out)
    assert f"{empty} exists: remove it" in fail(tree, "--out", empty)
    assert "vocab_size=5 must lie in" in fail(tree, "--out", out, "--vocab-size", 5)
    assert "the test split of 14 files is empty" in fail(
        tree, "--out", out, "--test-share", 1e-9, "--vocab-size", 600
    )

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    assert "no space left on the device" in fail(tree, "--out", out, "--vocab-size", 600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.tar"]


def test_damaged_folders_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="make one with scripts/prepare_linux.py"):
        PreparedCode(tmp_path / "none")
    with pytest.raises(ConfigError, match="is not prepared"):
        PreparedCode(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "test" / "tokens.npy").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tokens.npy is missing or damaged"):
        PreparedCode(copy).split("test")
    shutil.copy(folder / "train" / "tokens.npy", copy / "test")
    with pytest.raises(ConfigError, match="is damaged: prepare"):
        PreparedCode(copy).split("test")
