"""How functions are asked for, and what a right answer is, as tokens.

    define: NAME(                goes on with the parameters and the body's first tokens
    describe: DESCRIPTION        and on the next line, the signature up to the opening brace

Both are as they stand in the file, so an answer is copied token by token; then comes the end of
text. The parenthesis says that the name is over.
"""

import re

import numpy as np

from sparsex_jax.tasks.code.functions import describe
from sparsex_jax.tasks.code.prepared import CodeSplit
from sparsex_jax.tasks.tokenizer import Tokenizer

TASKS = ("name_to_definition", "description_to_function")
BODY = 32  # tokens of the beginning of a body, behind the opening brace
SIGNATURE = 64  # tokens at most, with the brace
DESCRIPTION = 128  # tokens at most, whole lines, of which the first may be cut
LEAST_WORDS = 4  # of a description
# New tokens that hold any answer: of a definition the rest of the signature and the body's begin.
ANSWER = {"name_to_definition": SIGNATURE + BODY, "description_to_function": SIGNATURE}
# Tokens that hold any question: of a name at most as many as of a signature.
QUESTION = {"name_to_definition": SIGNATURE + 8, "description_to_function": DESCRIPTION + 8}

# What is before and behind the words of a question.
_FRAME = {"name_to_definition": ("define: ", "("), "description_to_function": ("describe: ", "\n")}
_WORD = re.compile(r"[A-Za-z]{2,}")


def prompt_of(question: str) -> tuple[str, str] | None:
    """What a model reads for "define: NAME" or "describe: DESCRIPTION"; None for anything else.

    The second text is the part of the answer that it reads already.
    """
    for begin, end in _FRAME.values():
        if question.startswith(begin):
            return f"\n{question}{end}", end.strip()
    return None


class Wording:
    """Questions and answers about the functions of a split.

    Args:
      split: of the prepared folder.
      tokenizer: of the folder.
    """

    def __init__(self, split: CodeSplit, tokenizer: Tokenizer):
        self.split, self.tokenizer = split, tokenizer
        (self.brace,) = tokenizer.encode("{").tolist()

    def askable(self, task: str) -> np.ndarray:
        """Which functions can be asked for, bool [functions]; some may turn out to have no words.

        A signature has at most SIGNATURE tokens and ends with a brace that is a token; a body has
        at least BODY; a function that is described has a kernel-doc comment.
        """
        f = self.split.functions
        fits = self.split.tokens[f["body"] - 1] == self.brace
        fits &= f["body"] - f["begin"] <= SIGNATURE
        if task == "description_to_function":
            return fits & (f["doc"] >= 0)
        return fits & (f["end"] - f["body"] >= BODY)

    def description(self, function: np.void) -> str | None:
        """What its kernel-doc comment says of it; None where these are hardly words."""
        comment = self.tokenizer.decode(self.split.tokens[function["doc"] : function["begin"]])
        text = describe(comment, self.split.names[function["name"]])
        tokens = self.tokenizer.encode(text)
        if len(tokens) > DESCRIPTION:
            ends = np.flatnonzero(self.tokenizer.line_end[tokens[: DESCRIPTION + 1]])
            if len(ends):
                text = self.tokenizer.decode(tokens[: ends[-1]])
            else:
                text = self.tokenizer.decode(tokens[:DESCRIPTION]).rsplit(" ", 1)[0]
        return text if len(_WORD.findall(text)) >= LEAST_WORDS else None

    def question(self, task: str, words: str) -> np.ndarray:
        """The question about a name or a description, int32."""
        begin, end = _FRAME[task]
        return self.tokenizer.encode(f"\n{begin}{words}{end}")

    def answer(self, task: str, function: np.void) -> np.ndarray:
        """What a right answer generates before the end of text, int32.

        Behind a name, the token with the parenthesis is left out: in Linux 6.1 it is nothing else
        in 998 of 1,000 definitions.
        """
        tokens = self.split.tokens
        if task == "name_to_definition":
            return tokens[function["name_end"] + 1 : function["body"] + BODY].astype(np.int32)
        return tokens[function["begin"] : function["body"]].astype(np.int32)

    def compared(self, task: str, functions: np.ndarray) -> list[str]:
        """What of functions an answer is compared with: beginnings of bodies, or signatures."""
        first, last = ("begin", "body") if task == "description_to_function" else ("body", "end")
        ends = functions[last]
        if task == "name_to_definition":
            ends = np.minimum(ends, functions["body"] + BODY)
        tokens = self.split.tokens
        return self.tokenizer.decode_batch([
            tokens[begin:end] for begin, end in zip(functions[first], ends, strict=True)
        ])  # fmt: skip

    def counted(self, task: str, tokens: np.ndarray) -> np.ndarray:
        """Of generated tokens, int [n], -1 after their end, those up to the end of what is asked.

        That is the brace, and for a name the first BODY tokens behind it.
        """
        tokens = np.asarray(tokens)
        tokens = tokens[tokens >= 0]
        behind = np.append(np.flatnonzero(tokens == self.brace), len(tokens))[0] + 1
        return tokens[: behind + (BODY if task == "name_to_definition" else 0)]

    def generated(self, task: str, tokens: np.ndarray) -> str:
        """What is compared of generated tokens, as in `counted`; "" where there is no brace."""
        tokens = self.counted(task, tokens)
        if self.brace not in tokens:
            return ""
        if task == "name_to_definition":
            tokens = tokens[np.argmax(tokens == self.brace) + 1 :]
        return self.tokenizer.decode(tokens)
