"""Sources of our own, written or made up, and what `prepare` makes of them."""

import pathlib
import random
import shutil

import pytest

from sparsex_jax import cli
from sparsex_jax.tasks.code.prepare import PrepareConfig, prepare
from sparsex_jax.tasks.code.prepared import PreparedCode
from sparsex_jax.tasks.code.wording import Wording

SOURCES = pathlib.Path(__file__).parent / "sources"
THINGS = "lamp door valve motor clock fan pump mirror bell gate".split()
DEEDS = "open close turn warm cool count drain paint lift test".split()
CONFIG = PrepareConfig(vocab_size=1024, test_share=0.5)
MODEL = {
    "vocab-size": 1024, "model-dim": 16, "num-heads": 2, "num-kv-heads": 1, "head-dim": 8,
    "mlp-dim": 16, "layers": "s", "attention.window": 64, "attention.top-k": 2,
    "attention.score-dim": 8,
}  # fmt: skip
STAGES = """
from sparsex_jax.config import DataConfig, StageConfig, TrainConfig
mix = (("definitions", 1.0), ("descriptions", 1.0))
config = TrainConfig(stages=(StageConfig(steps=2, length=1024, batch_size=2, mix=mix),))
"""


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


@pytest.fixture(scope="session")
def model(folder, tmp_path_factory):
    """A model that took two steps."""
    root = tmp_path_factory.mktemp("runs")
    (root / "preset.py").write_text(STAGES)
    command = ["train", root / "preset.py", "--run-dir", root / "run", "--data.code", folder]
    for name, value in MODEL.items():
        command += [f"--model.{name}", value]
    assert cli.run([str(word) for word in command]) == 0
    return root / "run" / "model"
