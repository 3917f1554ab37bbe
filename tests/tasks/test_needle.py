"""The tasks: their structure, exact lengths, depths, references and errors."""

import re
import string

import numpy as np
import pytest

from sparsex_jax.tasks import (
    TASKS,
    make_haystack_with_needles,
    make_sample,
    score,
    smallest_length,
    words,
)
from sparsex_jax.tasks.haystack import DEPTHS, insert
from sparsex_jax.tasks.needle import check_length, largest_length
from sparsex_jax.tasks.phrases import Phrases

NEEDLE = re.compile(r"^One of the special magic (\w+) for (\S+) is: (\S+)\.$", re.MULTILINE)
NUMBER, UUID = re.compile(r"[1-9]\d{6}"), re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def draw(task, tokenizer, haystack, *, length=1024, seed=0, **options):
    rng = np.random.default_rng(seed)
    return make_sample(task, length, rng=rng, tokenizer=tokenizer, haystack=haystack, **options)


@pytest.mark.parametrize("task", TASKS)
def test_length_is_exact_and_references_are_hidden(task, tokenizer, haystack):
    least = smallest_length(task, tokenizer)
    for length in (least, least + 1, 777, 2048):
        for seed in range(4):
            sample = draw(task, tokenizer, haystack, length=length, seed=seed)
            assert sample.prompt.dtype == np.int32
            assert len(sample.prompt) == length - sample.answer_room
            assert len(sample.answer) <= sample.answer_room
            assert sample.answer[-1] in tokenizer.stop_ids
            prompt = tokenizer.decode(sample.prompt)
            assert all(reference in prompt for reference in sample.references)
            assert sample.question in prompt
            assert score(tokenizer.decode(sample.answer), sample.references) == 1
            assert not any(reference in sample.question for reference in sample.references)
            copied = sample.sources >= 0
            np.testing.assert_array_equal(
                sample.prompt[sample.sources[copied]], sample.answer[copied]
            )
            assert tokenizer.decode(sample.answer[~copied]).strip(" ,.and\n") == ""
            for reference, (begin, end) in zip(sample.references, sample.lines, strict=True):
                line = tokenizer.decode(sample.prompt[begin:end])
                assert reference in line and line.strip(" ").count("\n") == (task != "vt")
                assert ((begin <= sample.sources) & (sample.sources < end)).any()


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_says_what_fits(task, tokenizer, haystack):
    least = smallest_length(task, tokenizer)
    with pytest.raises(ValueError, match=f"length={least - 1} .*{task}.*use at least {least}$"):
        draw(task, tokenizer, haystack, length=least - 1)


def test_more_lines_than_keys_say_what_fits(tokenizer):
    for split in ("train", "held_out"):
        largest = largest_length("multikey_2", tokenizer, split)
        check_length("multikey_2", largest, tokenizer, split)
        message = f"length={largest + 1} .*multikey_2.*use at most {largest}, or another task$"
        with pytest.raises(ValueError, match=message):
            check_length("multikey_2", largest + 1, tokenizer, split)
    with pytest.raises(ValueError, match="use at most"):
        draw("multikey_2", tokenizer, np.zeros(0, np.int32), length=16 << 20)
    for task in set(TASKS) - {"multikey_2"}:
        check_length(task, 64 << 20, tokenizer)


def test_the_keys_are_enough_for_the_largest_length(tokenizer):
    phrases = Phrases(tokenizer)
    empty = len(phrases.value("a-a"))
    adjectives = {word: len(phrases.value(f"{word}-a")) - empty for word in words.ADJECTIVES}
    nouns = {word: len(phrases.value(f"a-{word}")) - empty for word in words.NOUNS}
    line = len(phrases.needle("numbers", "a-a", "1234567"))
    total = sum(
        line + adjectives[adjective] + nouns[noun]
        for adjective in adjectives
        for noun in nouns
        if words.split_of(adjective, noun) == "held_out"
    )
    assert 0.88 * total < largest_length("multikey_2", tokenizer, "held_out") < 0.92 * total


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_sample(task, tokenizer, haystack):
    one, same, other = (draw(task, tokenizer, haystack, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.prompt, same.prompt)
    assert one.references == same.references
    assert one.references != other.references


@pytest.mark.parametrize(
    ("task", "needles", "kind"),
    [
        ("single_1", 1, "numbers"),
        ("single_2", 1, "numbers"),
        ("single_3", 1, "uuids"),
        ("multikey_1", 4, "numbers"),
        ("multivalue", 4, "numbers"),
        ("multiquery", 4, "numbers"),
    ],
)
def test_needles_in_text(task, needles, kind, tokenizer, haystack):
    sample = draw(task, tokenizer, haystack)
    found = NEEDLE.findall(tokenizer.decode(sample.prompt))
    assert len(found) == needles
    form = NUMBER if kind == "numbers" else UUID
    for name, key, value in found:
        assert name == kind
        assert words.split_of(*key.split("-")) == "held_out"
        assert form.fullmatch(value)
    assert len({key for _, key, _ in found}) == (1 if task == "multivalue" else needles)
    asked = dict((value, key) for _, key, value in found)
    assert all(asked[reference] in sample.question for reference in sample.references)
    assert len(sample.references) == (4 if task in ("multivalue", "multiquery") else 1)


@pytest.mark.parametrize(("task", "form"), [("multikey_2", NUMBER), ("multikey_3", UUID)])
def test_every_line_is_a_needle(task, form, tokenizer, haystack):
    sample = draw(task, tokenizer, haystack, length=4096)
    lines = tokenizer.decode(sample.prompt).split("\n")
    found = [NEEDLE.fullmatch(line) for line in lines[1:-1]]
    filler = [line for line, match in zip(lines[1:-1], found, strict=True) if not match]
    assert all(line in "The grass is green. The sky is blue. The sun is yellow. Here we go. There"
               " and back again." for line in filler)  # fmt: skip
    matches = [match for match in found if match]
    assert len(matches) > 25
    assert len({match[2] for match in matches}) == len(matches)
    assert all(form.fullmatch(match[3]) for match in matches)
    [reference] = [match[3] for match in matches if match[2] in sample.question]
    assert sample.references == (reference,)


def test_wording_of_one_and_of_several(tokenizer, haystack):
    sample = draw("single_2", tokenizer, haystack)
    lines = tokenizer.decode(sample.prompt).split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it."
        " I will quiz you about the number afterwards."
    )
    key = re.search(r"for (\S+) mentioned", sample.question)[1]
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    sample = draw("multiquery", tokenizer, haystack)
    lines = tokenizer.decode(sample.prompt).split("\n")
    assert lines[0].startswith("Some special magic numbers are hidden within")
    assert re.fullmatch(
        r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned in the provided"
        r" text\? The special magic numbers for (\S+, ){3}and \S+ mentioned in the provided text"
        r" are",
        lines[-1],
    )


def test_variable_tracking(tokenizer, haystack):
    sample = draw("vt", tokenizer, haystack)
    text = tokenizer.decode(sample.prompt)
    assert text.count("Memorize and track the chain(s)") == 2
    value = re.search(r"the value (\d{5}) in", sample.question)[1]
    assert text.endswith(f"5 variables are assigned the value {value}, they are:")
    own = text[text.rindex("Memorize and track") :]
    sources = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", own))
    assert len(sources) == 5
    for name in sample.references:
        assert set(name) <= set(string.ascii_uppercase)
        while name != value:
            name = sources[name]
    places = [own.index(f"VAR {name} =") for name in sample.references]
    assert places == sorted(places)


def test_depth_is_where_it_was_asked(tokenizer, haystack):
    assert len(set(DEPTHS)) == 40
    assert (DEPTHS[0], DEPTHS[-1]) == (0, 100)
    length = 8192
    for depth in (0, 33, 50, 100):
        for task in ("single_1", "single_2", "single_3", "multikey_1", "multikey_2"):
            sample = draw(task, tokenizer, haystack, length=length, depth=depth)
            assert sample.depth == depth
            text = tokenizer.decode(sample.prompt)
            before = text[: text.index(f"{sample.references[0]}.\n")]
            assert abs(len(before) / len(text) - depth / 100) < 0.06
    assert draw("single_2", tokenizer, haystack).depth in DEPTHS
    with pytest.raises(ValueError, match="depth=101 must lie"):
        draw("single_2", tokenizer, haystack, depth=101)


def test_hidden_lines_keep_the_text_and_stand_alone(tokenizer):
    line = tokenizer.encode("here\n")
    text = tokenizer.encode("one\ntwo three\nfour\n")
    for depth, expected in (
        (0, "here\none\ntwo three\nfour\n"),
        (60, "one\nhere\ntwo three\nfour\n"),
        (100, "one\ntwo three\nfour\nhere\n"),
    ):
        context, _ = insert(text.copy(), [line], [depth], tokenizer)
        assert tokenizer.decode(context) == expected
    endless = np.resize(tokenizer.encode("word "), 4000)
    context, [position] = insert(endless, [line], [50], tokenizer)
    assert len(context) == 4000 + len(line)
    assert position == 2000
    assert "\nhere\n" in tokenizer.decode(context)


def test_pieces_encode_as_the_whole(tokenizer):
    phrases = Phrases(tokenizer)
    for kind, value in (
        ("numbers", "1234567"),
        ("uuids", words.draw_uuid(np.random.default_rng(0))),
    ):
        needle = phrases.needle(kind, "quiet-river", value)
        whole = f"One of the special magic {kind} for quiet-river is: {value}.\n"
        np.testing.assert_array_equal(needle, tokenizer.encode(whole))
        question = phrases.question(kind, ["quiet-river", "old-tree"], single=False)
        np.testing.assert_array_equal(question, tokenizer.encode(tokenizer.decode(question)))


def test_one_context_many_questions(tokenizer, haystack):
    depths = [95, 5, 25, 45, 65, 85]
    made = [
        make_haystack_with_needles(
            4096, depths, rng=np.random.default_rng(1), tokenizer=tokenizer, haystack=haystack
        )
        for _ in range(2)
    ]
    context = made[0]
    np.testing.assert_array_equal(context.tokens, made[1].tokens)
    longest = max(len(needle.prompt) for needle in context.needles)
    assert len(context.tokens) + longest + context.answer_room == 4096
    assert len({needle.key for needle in context.needles}) == 6
    assert {needle.kind for needle in context.needles} == {"numbers", "uuids"}
    for needle, depth in zip(context.needles, depths, strict=True):
        assert abs(needle.position / len(context.tokens) - depth / 100) < 0.06
        line = tokenizer.decode(context.tokens[needle.position :]).split("\n")[0]
        match = NEEDLE.fullmatch(line)
        assert match.groups() == (needle.kind, needle.key, needle.value)
        assert tokenizer.decode(needle.prompt).startswith(needle.question)
    with pytest.raises(ValueError, match="length=100 cannot hold 6 needles .* use at least"):
        make_haystack_with_needles(
            100, depths, rng=np.random.default_rng(1), tokenizer=tokenizer, haystack=haystack
        )
    with pytest.raises(ValueError, match=r"depths=\[\] must be"):
        make_haystack_with_needles(
            4096, [], rng=np.random.default_rng(1), tokenizer=tokenizer, haystack=haystack
        )


def test_unknown_task(tokenizer, haystack):
    with pytest.raises(ValueError, match="task='nope' is not known: use one of single_1"):
        draw("nope", tokenizer, haystack)


def test_splits_of_words_are_disjoint():
    rng = np.random.default_rng(0)
    train = {words.draw_pair(rng, "train") for _ in range(2000)}
    held_out = {words.draw_pair(rng, "held_out") for _ in range(2000)}
    assert not train & held_out
    similar = words.draw_similar(rng, "train", ("quiet", "river"))
    assert similar != ("quiet", "river")
    assert ("quiet" in similar) != ("river" in similar)
    assert words.split_of(*similar) == "train"


def test_score_is_the_share_found_whatever_the_case():
    assert score("It is ABC-1 and 22.", ("abc-1", "22")) == 1
    assert score("It is ABC-1.", ("abc-1", "22")) == 0.5
    assert score("", ("abc-1",)) == 0
