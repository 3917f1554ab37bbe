import json

import jax
import pytest

from sparsex_jax import cli
from sparsex_jax.cache import Engine
from sparsex_jax.commands import evaluate
from sparsex_jax.commands.model import read_haystack
from sparsex_jax.tasks import load
from sparsex_jax.training import model_crc32
from tests.test_cli import fail, model, text

__all__ = ["fail", "model", "text"]  # fixtures


@pytest.mark.parametrize("name", ["a file/needle.json", "a folder"])
def test_out_is_checked_before_any_work(name, model, text, tmp_path, fail, monkeypatch):
    (tmp_path / "a file").write_text("")
    (tmp_path / "a folder").mkdir()
    monkeypatch.setattr(evaluate, "make_console", lambda: pytest.fail("the work has begun"))
    out = tmp_path / name
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    message = fail(*command, "--lengths", "1K", "--samples", 1)
    assert f"out='{out}'" in message and "use a file" in message and "Errno" not in message
    assert not list((tmp_path / "a folder").iterdir())


def test_a_task_that_does_not_fit_is_a_row(model, text, tmp_path, capsys, monkeypatch):
    def generate(self, prompt, max_new_tokens, stop_tokens=(), progress=None):
        if self.capacity > 1024:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(self, prompt, max_new_tokens, stop_tokens, progress)

    real = Engine.generate
    monkeypatch.setattr(Engine, "generate", generate)
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    command += ["--lengths", "1K", "2K", "--samples", 2, "--tasks", "single_2", "single_3"]
    assert cli.run([str(word) for word in command]) == 0
    results = json.loads(out.read_text())
    assert results["config"]["model_crc32"] == model_crc32(model)
    measured, full = results["rows"][:2], results["rows"][2:]
    assert [row["status"] for row in measured] == ["measured"] * 2
    assert [(row["task"], row["tokens"], row["status"]) for row in full] == [
        ("single_2", 2048, "out_of_memory"), ("single_3", 2048, "out_of_memory"),
    ]  # fmt: skip
    assert full[0]["accuracy"] is None
    assert "single_3 at 2K: out of memory" in capsys.readouterr().out


def test_other_errors_of_the_device_are_not_hidden(model, text, tmp_path, monkeypatch):
    def generate(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(Engine, "generate", generate)
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--lengths", "1K"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        cli.run([*map(str, command), "--out", str(tmp_path / "needle.json")])


def test_haystack_is_not_claimed_to_be_new_to_every_model():
    description = read_haystack(None, load(), count=100)[1]
    assert "held-out split" in description and "never" not in description
