"""The project's own files say what is so."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from packaging.requirements import Requirement

import sparsex_jax
from sparsex_jax.config import AttentionConfig, TrainConfig
from sparsex_jax.landmarks import num_levels, visible_nodes


def test_readme_example_runs(project):
    examples = re.findall(
        r"^```python\n(.*?)^```", (project / "README.md").read_text(), re.S | re.M
    )
    assert len(examples) == 1
    names = {}
    exec(compile(examples[0], "README.md", "exec"), names)
    assert names["answer"].shape == (1, 8)
    assert np.all(names["answer"] >= 0)


def test_links_lead_somewhere(project):
    for path in (project / "README.md", *(project / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_presets_are_configs(project):
    presets = list((project / "configs").glob("*.py"))
    assert presets
    for path in presets:
        assert isinstance(runpy.run_path(str(path))["config"], TrainConfig)


def test_pins_satisfy_the_requirements(project):
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==") for line in (project / "constraints.txt").read_text().split() if line
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    extras = described["optional-dependencies"]
    wanted = described["dependencies"] + extras["dev"] + extras["code"] + extras["compile"]
    for requirement in map(Requirement, wanted):
        version = pinned[requirement.name.lower()]
        assert requirement.specifier.contains(version), requirement
    assert not {"uv", "pip", described["name"]} & set(pinned)


def test_installed_version_and_package_data(project):
    files = {str(file) for file in sparsex_jax.__spec__.submodule_search_locations}
    assert files == {str(project / "sparsex_jax")}
    assert (project / "sparsex_jax" / "assets" / "tokenizer.json").is_file()
    assert importlib.metadata.version("sparsex-jax") == sparsex_jax.__version__


def test_licence_is_complete(project):
    text = (project / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def test_no_machine_paths_and_no_index_addresses(project):
    names = ("Makefile", "pyproject.toml", "constraints.txt", "README.md", ".ci/run")
    for path in [*(project / name for name in names), *(project / "scripts").glob("*.sh")]:
        assert not re.search(r"index-url|/simple|/work/|/root/|/home/", path.read_text()), path


@pytest.mark.parametrize(
    ("tokens", "nodes"),
    [
        (16 << 10, [5, 5, 4]),
        (128 << 10, [5, 5, 4, 4, 4, 4]),
        (1 << 20, [5, 5] + [4] * 7),
        (4 << 20, [5, 5] + [4] * 9),
        (64 << 20, [5, 5] + [4] * 13),
    ],
)
def test_pyramid_table_of_the_docs(tokens, nodes, project):
    config = AttentionConfig()
    segments = (tokens - config.window) // config.segment_length
    levels = num_levels(segments, config)
    spans = visible_nodes(np.int32(segments), levels, config.nodes_per_level)
    assert [int(count) for _, count in spans] == nodes
    row = f"| {' '.join(map(str, nodes))} | {sum(nodes)} | {5 * sum(nodes)} |"
    assert row in (project / "docs" / "math.md").read_text()


def test_attention_pattern_is_drawn(project, tmp_path):
    script = runpy.run_path(str(project / "scripts" / "draw_attention_pattern.py"))
    script["draw"](tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").read_bytes().startswith(b"\x89PNG")
    pattern = script["attention_pattern"](AttentionConfig(16, 8, 2, 16, 2, 2), 64)
    assert not np.triu(pattern, 1).any()
    assert set(np.unique(pattern)) == {0, 1, 2, 3}


@pytest.fixture
def bare(project, tmp_path):
    """A copy of what set-up needs, and a PATH that has no Python."""
    root, bin_dir = tmp_path / "project", tmp_path / "bin"
    (root / "scripts").mkdir(parents=True)
    bin_dir.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        shutil.copy(project / name, root / name)
    for name in ("bash", "dirname", "env", "make", "touch"):
        os.symlink(shutil.which(name), bin_dir / name)
    environment = {"PATH": str(bin_dir), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    return root, bin_dir, environment


def test_no_python_gives_one_clear_line(bare):
    root, _, environment = bare
    done = subprocess.run(
        ["make", "demo"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and not done.stdout
    assert said[0].startswith("sparsex: no Python >= 3.12")
    assert not (root / ".venv").exists()


def test_setup_passes_over_pythons_that_do_not_run_or_are_old(bare):
    root, bin_dir, environment = bare
    (bin_dir / "python3.12").write_text("#!/bin/bash\nexit 127\n")  # a pyenv shim
    (bin_dir / "python3").write_text("#!/bin/bash\nexit 1\n")  # 3.11, say
    versions = root.parent / "versions" / "3.13.1" / "bin"
    versions.mkdir(parents=True)
    # Stands for a Python: it answers questions and makes an environment of two programs.
    (versions / "python").write_text(
        '#!/bin/bash\n[ "$1 $2" = "-m venv" ] || exit 0\n'
        'mkdir -p "$4/bin"; for name in python uv; do\n'
        'printf "#!/bin/bash\\necho $name \\"\\$@\\" >> log\\n" > "$4/bin/$name"\n'
        'chmod +x "$4/bin/$name"; done\n'
    )
    os.symlink(shutil.which("mkdir"), bin_dir / "mkdir")
    os.symlink(shutil.which("chmod"), bin_dir / "chmod")
    for path in (bin_dir / "python3.12", bin_dir / "python3", versions / "python"):
        path.chmod(0o755)

    def setup(target="setup"):
        return subprocess.run(
            ["make", target], cwd=root, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert str(versions / "python") in setup()
    installs = [line for line in (root / "log").read_text().splitlines() if "install" in line]
    assert installs == [
        "uv pip install --compile-bytecode --python .venv/bin/python --constraint constraints.txt"
        " --editable .[dev,code]"
    ]
    setup()
    assert len((root / "log").read_text().splitlines()) == len(installs)  # nothing was done again
    os.utime(root / "pyproject.toml", (2e9, 2e9))
    setup()
    assert (root / "log").read_text().count("pip install") == 2
    # What only tests need does not get in the way of the program.
    setup(".venv/.compiler-stamp")
    assert (
        (root / "log")
        .read_text()
        .splitlines()[-1]
        .endswith("--target .venv/compiler --no-deps --requirements -")
    )


def test_program_is_quiet():
    # libtpu, which only tests have, says by TPU_LIBRARY_PATH where it is.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "JAX_PLATFORMS" and not name.startswith("TPU_")
    }
    code = "from sparsex_jax.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "info"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    assert "range_attention: " in done.stdout


def test_module_is_what_the_script_runs(project):
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    module, _, function = described["scripts"]["sparsex"].partition(":")
    code = (
        f"import sys; sys.argv[1:] = ['--version']; from {module} import {function}; {function}()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"sparsex {sparsex_jax.__version__}\n"
