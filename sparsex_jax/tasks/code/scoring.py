"""When an answer about code is right, as in RepoQA (Liu et al. 2024, arXiv:2406.06025).

It has to be more like the function asked for than like any other of the context, and like it
enough: RepoQA's threshold of 0.8 for BLEU (Papineni et al. 2002), here over the words of C with
one added to the counts of pairs, triples and fours (Lin, Och 2004).
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence

THRESHOLD = 0.8
_ORDER = 4
_WORD = re.compile(r"[A-Za-z_]\w*|\d\w*|\S")


def words(text: str) -> tuple[str, ...]:
    """Identifiers, numbers and other characters; spaces only part them."""
    return tuple(_WORD.findall(text))


def bleu(answer: Sequence[str], target: Sequence[str]) -> float:
    """How much words are like others, from 0 to 1; 1 if they are the same."""
    if not answer or not target:
        return 0.0
    total = 0.0
    orders = range(1, min(_ORDER, len(answer)) + 1)
    for order in orders:
        found, wanted = _runs(answer, order), _runs(target, order)
        same, count = sum((found & wanted).values()), found.total()
        if order == 1 and not same:
            return 0.0
        added = order > 1
        total += math.log((same + added) / (count + added))
    brevity = min(0.0, 1 - len(target) / len(answer))
    return math.exp(brevity + total / len(orders))


def _runs(text: Sequence[str], order: int) -> collections.Counter:
    return collections.Counter(zip(*(text[i:] for i in range(order)), strict=False))


def is_right(answer: str, target: str, others: Iterable[Sequence[str]]) -> bool:
    """Whether an answer is the target rather than any of the others.

    Args:
      answer, target: texts.
      others: the words of each of the others.
    """
    found, wanted = words(answer), words(target)
    if found == wanted:
        return all(wanted != tuple(other) for other in others)
    likeness = bleu(found, wanted)
    if likeness < THRESHOLD:
        return False
    return all(bleu(found, other) < likeness for other in others)
