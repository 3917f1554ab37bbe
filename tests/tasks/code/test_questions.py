"""Contexts, what is asked about them, when an answer is right, and BM25 on the same questions."""

import re

import numpy as np
import pytest

from sparsex_jax.baselines import retrieval
from sparsex_jax.baselines.retrieval import (
    CHUNK,
    Bm25Retriever,
    EmbeddingRetriever,
    cut_chunks,
    terms,
)
from sparsex_jax.commands.code_systems import is_at_definition, sources_of
from sparsex_jax.tasks.code.questions import ROOM, CodeContext
from sparsex_jax.tasks.code.scoring import THRESHOLD, bleu, is_right, words
from sparsex_jax.tasks.code.wording import TASKS

LENGTH = 9000


@pytest.fixture(scope="module")
def context(wording):
    return CodeContext(wording, LENGTH, np.random.default_rng(0), 12)


@pytest.fixture(scope="module")
def text(context, wording):
    return wording.tokenizer.decode(context.tokens)


def test_contexts_are_whole_files_without_what_was_removed(context, text, wording, tree):
    assert len(context.tokens) <= LENGTH - ROOM
    assert context.names == sorted(context.names)
    assert all(name in wording.split.files for name in context.names)
    described = context.questions("description_to_function")
    assert len(described) == 12
    kept = 0
    for number, name in enumerate(context.names):
        part = context.tokens[context.bounds[number] : context.bounds[number + 1]]
        source = (tree / name).read_text()
        for comment in re.findall(r"/\*\*\n.*?\*/\n", source, re.S):
            if comment not in wording.tokenizer.decode(part):
                source = source.replace(comment, "")
            else:
                kept += 1
        assert wording.tokenizer.decode(part) == source
    documented = text.count("/**\n")
    everything = sum((tree / name).read_text().count("/**\n") for name in context.names)
    assert documented == kept == everything - 12


def test_descriptions_are_not_in_the_context(context, text):
    for question in context.questions("description_to_function"):
        title, *_ = question.text.splitlines()
        assert title not in text and len(words(title)) > 4
        name = re.search(r"(\w+)\(", question.target)[1]
        assert name not in question.text
        assert text.count(question.target) == 1


def test_names_are_defined_once_and_called(context, text, wording):
    questions = context.questions("name_to_definition")
    assert len(questions) == 12
    for question in questions:
        name = question.text
        assert len(re.findall(rf"^int {name}\(", text, re.M)) == 1
        assert re.search(rf"\t.*\b{name}\(", text)
        around = context.tokens[question.position : question.position + 40]
        assert wording.tokenizer.decode(around).lstrip().startswith(f"{name}(")
        assert wording.tokenizer.decode(question.prompt) == f"\ndefine: {name}("


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_are_right_and_others_are_not(task, context, wording):
    questions = context.questions(task)
    for question, other in zip(questions, [*questions[1:], questions[0]], strict=True):
        answer, begin = context.answer(question)
        np.testing.assert_array_equal(context.tokens[begin : begin + len(answer)], answer)
        right, wrong = (
            wording.generated(task, np.append(context.answer(q)[0], [-1] * 3))
            for q in (question, other)
        )
        more = np.concatenate((answer, context.tokens[:9], [-1]))
        np.testing.assert_array_equal(wording.counted(task, more), answer)
        assert wording.generated(task, more) == right
        assert words(right) == words(question.target)
        assert context.is_right(question, right)
        assert not context.is_right(question, wrong)
        assert not context.is_right(question, "")
        near = wording.tokenizer.encode(right)
        near = near[: len(near) // 2]
        assert not context.is_right(question, wording.tokenizer.decode(near))


def test_questions_depend_on_nothing_else(context, wording):
    again = CodeContext(wording, LENGTH, np.random.default_rng(0), 12)
    np.testing.assert_array_equal(again.tokens, context.tokens)
    other = CodeContext(wording, LENGTH, np.random.default_rng(1), 12)
    for task in TASKS:
        first, second, third = (
            [q.text for q in x.questions(task)] for x in (context, again, other)
        )
        assert first == second != third


def test_likeness():
    target = words("int kept = clamp(share, 0, 100);\n\treturn kept;")
    assert bleu(target, target) == 1
    assert words("int  kept=clamp( share,0,100 ); return kept ;") == target
    one_off = words("int kept = clamp(share, 0, 101); return kept;")
    assert THRESHOLD < bleu(one_off, target) < 1
    assert bleu(words("void other(char *name)"), target) < 0.2
    assert bleu(target[:4], target) < THRESHOLD
    assert bleu([], target) == bleu(target, []) == bleu(["x"], ["y"]) == 0


def test_a_near_miss_is_wrong_where_another_function_is_as_near():
    target = "int low = values[0], high = values[0]; return high - low;"
    answer = target.replace("high - low", "high + low")
    assert is_right(answer, target, [words("void f(int x)")])
    assert not is_right(answer, target, [words(answer)])
    assert not is_right(answer, target, [words(target)])
    assert not is_right("void f(int x)", target, [])


def test_chunks_end_at_lines_and_files(context, wording):
    cuts = cut_chunks(context.tokens, context.bounds, wording.tokenizer)
    assert cuts[0] == 0 and cuts[-1] == len(context.tokens)
    assert np.diff(cuts).min() > 0 and np.diff(cuts).max() <= CHUNK
    assert np.isin(context.bounds, cuts).all()
    assert wording.tokenizer.line_end[context.tokens[cuts[1:] - 1]].all()
    long = np.full(3 * CHUNK, wording.tokenizer.encode("x")[0])
    assert np.diff(cut_chunks(long, [0, len(long)], wording.tokenizer)).tolist() == [CHUNK] * 3


def test_terms_of_identifiers():
    assert terms("static intel_fbInit(u8 x)") == [
        "static", "intel_fbinit", "intel", "fb", "init", "u8", "u", "8", "x",
    ]  # fmt: skip
    assert terms("HTTPServer2") == ["httpserver2", "http", "server", "2"]


def test_bm25_finds_what_one_chunk_names(wording):
    tokenizer = wording.tokenizer
    files = [f"int {name}_get(void)\n{{\n\treturn {name};\n}}\n" * 3 for name in "abcdef"]
    files[3] = "int needle_of_hay(void)\n{\n\treturn 1;\n}\n"
    parts = tokenizer.encode_batch(files)
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    retriever = Bm25Retriever(np.concatenate(parts), bounds, tokenizer)
    assert len(retriever.cuts) == 7
    assert retriever.rank("needle_of_hay", int(bounds[3]) + 1) == 1
    assert retriever.rank("b_get", int(bounds[1])) == 1
    assert retriever.best("needle_of_hay", 3) == [(bounds[3], bounds[4])]
    assert [begin for begin, _ in retriever.best("int", 2)] == [0, bounds[1]]
    # Chunks without a term are not retrieved; the earlier of equal ones comes first.
    assert retriever.rank("needle_of_hay", 0) is None
    assert retriever.rank("zebra", 0) is None
    assert [retriever.rank("int", int(bounds[i])) for i in (0, 1)] == [1, 2]


def test_bm25_finds_most_of_what_is_asked(context, wording):
    retriever = Bm25Retriever(context.tokens, context.bounds, wording.tokenizer)
    for task in TASKS:
        ranks = [
            retriever.rank(question.text, question.position) for question in context.questions(task)
        ]
        assert sum(rank is not None and rank <= 5 for rank in ranks) >= 9


def test_embeddings_rank_by_cosine(wording, monkeypatch):
    vectors = {"b": [1, 0], "a": [0.6, 0.8], "c": [0, 1], "query": [0, 1]}

    class Embedder:
        def encode(self, texts, normalize_embeddings, show_progress_bar):
            assert normalize_embeddings and not show_progress_bar
            return np.array([vectors[text.strip()] for text in texts])

    monkeypatch.setattr(retrieval, "find_embedder", Embedder)
    parts = wording.tokenizer.encode_batch(["a\n", "b\n", "c\n"])
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    retriever = EmbeddingRetriever(np.concatenate(parts), bounds, wording.tokenizer)
    assert [retriever.rank("query", int(place)) for place in bounds[:-1]] == [2, 3, 1]
    assert retriever.best("query", 2) == [(bounds[2], bounds[3]), (bounds[0], bounds[1])]


def test_provenance_is_a_place_within_the_definition(context, wording):
    sources = sources_of(context, wording.tokenizer)
    for question in context.questions("name_to_definition")[:4]:
        begin, end = context.spans[question.function]
        assert begin <= question.position < end
        body = wording.tokenizer.decode(context.tokens[begin:end])
        assert question.text in body and body.rstrip().endswith("}")
        for place, expected in ((begin, True), (end - 1, True), (0, False), (end + 40, False)):
            attention = np.zeros(len(context.tokens))
            attention[place] = 1
            assert is_at_definition(attention, context, question, sources) == expected
        assert not is_at_definition(0 * attention, context, question, sources)
