"""Contexts of whole files, and what is asked about the functions in them."""

import collections
import dataclasses
import functools

import numpy as np

from sparsex_jax.tasks.code.prepared import CodeSplit
from sparsex_jax.tasks.code.scoring import is_right, words
from sparsex_jax.tasks.code.wording import ANSWER, QUESTION, TASKS, Wording

ROOM = max(QUESTION[task] + ANSWER[task] for task in TASKS)  # tokens of a question and its answer
LEAST_LENGTH = 4096  # tokens of a context with its room


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A question about a context.

    Attributes:
      task: of `TASKS`.
      text: the name, or the description.
      prompt: int32, what the model reads behind the context.
      target: what the answer is compared with.
      function: number among those of the context.
      position: of the function's name in its definition, among the context's tokens.
    """

    task: str
    text: str
    prompt: np.ndarray
    target: str
    function: int
    position: int


class CodeContext:
    """Whole files of a split, one after another in the order of their paths.

    Files are drawn at random; one that no longer fits is left out. Of `questions` functions, or as
    many as there are, the kernel-doc comment is removed, and they are asked for by what it says;
    as many are asked for by their names.

    A name that is asked for is that of one definition of the context, and is called outside of
    it; no other body begins with the same words. So is a described function's name that of one
    definition, and no other kernel-doc comment of the context says the same.

    Args:
      wording: of the split that files are drawn from.
      length: tokens of the context, a question and its answer, at most.
      rng: decides everything.
      questions: most of each task.

    Attributes:
      tokens: int32 [N].
      bounds: where files begin in them, and N.
      names: paths of the files.
      spans: of each function's definition, first token and the one behind the last, int [n, 2].

    Raises:
      ValueError: `length` is less than `LEAST_LENGTH`, or more than the split has.
    """

    def __init__(self, wording: Wording, length: int, rng: np.random.Generator, questions: int):
        split = wording.split
        check_length(length, split)
        files = _draw_files(split, length - ROOM, rng)
        inside = np.flatnonzero(np.isin(split.functions["file"], files))
        self._wording, self._inside = wording, inside
        self.names = [split.files[i] for i in files]
        functions = split.functions[inside]
        once = np.bincount(functions["name"], minlength=len(split.names)) == 1
        unique = once[functions["name"]]
        chosen = {
            task: rng.permutation(np.flatnonzero(unique & wording.askable(task)[inside]))
            for task in TASKS
        }
        described = self._descriptions(chosen["description_to_function"], questions)
        named = chosen["name_to_definition"]
        named = named[self._is_called(files, named) & self._is_distinct(named)][:questions]
        removed = [(functions["doc"][i], functions["begin"][i]) for i in described]
        self._assemble(files, removed)
        self._asked = {
            "name_to_definition": {i: split.names[functions["name"][i]] for i in named},
            "description_to_function": described,
        }

    def _descriptions(self, chosen: np.ndarray, count: int) -> dict[int, str]:
        """The first functions, by their numbers in the context, whose descriptions are unlike."""
        functions = self._wording.split.functions[self._inside]
        documented = np.flatnonzero(functions["doc"] >= 0)
        said = {i: self._wording.description(functions[i]) for i in documented}
        often = collections.Counter(said.values())
        found: dict[int, str] = {}
        for i in chosen:
            text = said[i]
            if len(found) < count and text is not None and often[text] == 1:
                found[int(i)] = text
        return found

    def _is_called(self, files: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Whether functions are called in the context outside of their own definition."""
        split = self._wording.split
        functions, calls = split.functions[self._inside], split.calls
        where = np.searchsorted(split.bounds, calls["position"], side="right") - 1
        calls = calls[np.isin(where, files)]
        count = np.bincount(calls["name"], minlength=len(split.names))
        place = np.searchsorted(functions["begin"], calls["position"], side="right") - 1
        around = functions[np.maximum(place, 0)]
        own = (place >= 0) & (around["name"] == calls["name"])
        own &= calls["position"] < around["end"]
        count -= np.bincount(calls["name"][own], minlength=len(split.names))
        return count[functions["name"][chosen]] > 0

    def _is_distinct(self, chosen: np.ndarray) -> np.ndarray:
        """Whether no other function's body begins with the same words."""
        beginnings = self._all_words["name_to_definition"]
        count = collections.Counter(beginnings)
        return np.array([count[beginnings[i]] == 1 for i in chosen], bool)

    def _words(self, task: str) -> list[tuple[str, ...]]:
        functions = self._wording.split.functions[self._inside]
        return [words(text) for text in self._wording.compared(task, functions)]

    @functools.cached_property
    def _all_words(self) -> dict[str, list[tuple[str, ...]]]:
        return {task: self._words(task) for task in TASKS}

    def _assemble(self, files: np.ndarray, removed: list[tuple[int, int]]) -> None:
        """Puts the files together, without some spans of the split."""
        split = self._wording.split
        starts, ends = split.bounds[files], split.bounds[files + 1]
        offset = np.concatenate([[0], np.cumsum(ends - starts)])
        parts = [split.tokens[begin:end] for begin, end in zip(starts, ends, strict=True)]
        tokens = np.concatenate(parts).astype(np.int32)
        kept = np.ones(len(tokens), bool)

        def place(position: np.ndarray) -> np.ndarray:
            number = np.searchsorted(starts, position, side="right") - 1
            return position - starts[number] + offset[number]

        for begin, end in removed:
            first = int(place(np.array([begin]))[0])
            kept[first : first + end - begin] = False
        before = np.concatenate([[0], np.cumsum(kept)])
        self.tokens = tokens[kept]
        self.bounds = before[offset]
        functions = split.functions[self._inside]
        self._positions = before[place(functions["name_begin"])]
        ends = before[place(functions["end"] - 1)] + 1
        self.spans = np.stack([before[place(functions["begin"])], ends], axis=1)

    def questions(self, task: str) -> list[Question]:
        """What is asked, always in the same order."""
        wording = self._wording
        asked = self._asked[task]
        rows = wording.split.functions[self._inside[list(asked)]]
        targets = wording.compared(task, rows)
        return [
            Question(task, text, wording.question(task, text), target, i, int(self._positions[i]))
            for (i, text), target in zip(asked.items(), targets, strict=True)
        ]

    def answer(self, question: Question) -> tuple[np.ndarray, int]:
        """What a right answer generates, int32, and where that begins among the tokens."""
        function = self._wording.split.functions[self._inside[question.function]]
        name_end = question.position + function["name_end"] - function["name_begin"]
        named = question.task == "name_to_definition"
        begin = name_end + 1 if named else self.spans[question.function][0]
        return self._wording.answer(question.task, function), int(begin)

    def is_right(self, question: Question, answer: str) -> bool:
        """Whether an answer is that to a question rather than to one about another function.

        A signature has to have the right name, too.
        """
        if question.task == "description_to_function":
            function = self._wording.split.functions[self._inside[question.function]]
            if self._wording.split.names[function["name"]] not in words(answer):
                return False
        everyone = self._all_words[question.task]
        others = everyone[: question.function] + everyone[question.function + 1 :]
        return is_right(answer, question.target, others)


def check_length(length: int, split: CodeSplit) -> None:
    """Raises ValueError unless contexts of a length can be made of a split."""
    if length < LEAST_LENGTH:
        raise ValueError(f"lengths={length} cannot hold questions: use at least {LEAST_LENGTH}")
    if length - ROOM > len(split.tokens):
        raise ValueError(
            f"lengths={length} is more than the {len(split.tokens)} tokens of {split.folder}: use"
            f" at most {len(split.tokens)}"
        )


def _draw_files(split: CodeSplit, room: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of random files of so many tokens at most, ascending."""
    sizes = np.diff(split.bounds)
    chosen = []
    for number in rng.permutation(len(sizes)):
        if sizes[number] <= room:
            chosen.append(number)
            room -= sizes[number]
    return np.sort(np.array(chosen, np.int64))
