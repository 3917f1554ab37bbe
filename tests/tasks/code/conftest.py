"""Sources of our own, written or made up, and what `prepare` makes of them."""

import pathlib
import random
import shutil

import pytest

from sparsex_jax.tasks.code.prepare import PrepareConfig, prepare
from sparsex_jax.tasks.code.prepared import PreparedCode
from sparsex_jax.tasks.code.wording import Wording

SOURCES = pathlib.Path(__file__).parent / "sources"
THINGS = "lamp door valve motor clock fan pump mirror bell gate".split()
DEEDS = "open close turn warm cool count drain paint lift test".split()
CONFIG = PrepareConfig(vocab_size=1024, test_share=0.5)


def made_up_file(thing: str, rng: random.Random) -> str:
    """A function for each deed, documented, and one that calls them."""
    parts = [f"/* What a {thing} can do. */\n"]
    calls = []
    for deed in DEEDS:
        name = f"{thing}_{deed}"
        numbers = [rng.randrange(1000) for _ in range(4)]
        why = " ".join(rng.sample(DEEDS + THINGS, 6))
        parts.append(f"""
/**
 * {name}() - {deed.capitalize()} the {thing} so that {why}
 * @{thing}: which one
 *
 * Never call {name}() twice.
 */
int {name}(struct {thing} *{thing}, int level)
{{
	int {deed} = {thing}->{rng.choice(THINGS)} + {numbers[0]};

	if (level > {numbers[1]})
		{deed} -= {rng.choice(DEEDS)}_level(level) / {numbers[2]};
	while ({deed} > {numbers[3]})
		{deed} = {deed} / 2;
	return {deed};
}}
""")
        calls.append(f"\ttotal += {name}({thing}, {rng.randrange(100)});\n")
    rng.shuffle(calls)
    parts.append(f"\nint {thing}_all(struct {thing} *{thing})\n{{\n\tint total = 0;\n\n")
    return "".join([*parts, *calls, "\treturn total;\n}\n"])


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("c") / "project"
    shutil.copytree(SOURCES, root)
    rng = random.Random(0)
    for number, thing in enumerate(THINGS):
        folder = root / f"part_{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{thing}.c").write_text(made_up_file(thing, rng))
    return root


@pytest.fixture(scope="session")
def folder(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "project"
    prepare(tree, out, CONFIG)
    return out


@pytest.fixture(scope="session")
def prepared(folder):
    return PreparedCode(folder)


@pytest.fixture(scope="session")
def wording(prepared):
    return Wording(prepared.split("test"), prepared.tokenizer)
