"""What `sparsex bench prefill` times."""

import dataclasses

from sparsex_jax.benchmarks import prefill
from sparsex_jax.cache import Engine
from tests.modules.test_transformer import TINY, make


def test_no_sample_holds_the_compilation_of_a_program(tmp_path, monkeypatch):
    engines, programs = [], []

    def engine(*arguments, **names):
        engines.append(Engine(*arguments, **names))
        return engines[-1]

    def measure(call, samples, budget):
        programs.append(engines[-1]._read._cache_size())
        call()
        programs.append(engines[-1]._read._cache_size())
        return timed(call, samples, budget)

    timed = prefill.measure
    monkeypatch.setattr(prefill, "Engine", engine)
    monkeypatch.setattr(prefill, "measure", measure)
    # Between chunks none of the tokens attends in the sparse layer; at the end some do.
    model = make(dataclasses.replace(TINY, layers="sl"))
    settings = prefill.Settings(
        lengths=(1024,), chunk=256, tiers=("device",), samples=1, seconds=0.1, check_length=None,
        seed=0,
    )  # fmt: skip
    benchmark = prefill.Benchmark(model, {}, settings, tmp_path / "prefill.json", "")
    (step,) = benchmark.steps()
    assert benchmark.run(step)["status"] == "measured"
    assert programs == [2, 2]
