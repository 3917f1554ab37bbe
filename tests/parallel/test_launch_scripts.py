"""Launch scripts are well-formed, and use flags that there are."""

import re
import shutil
import subprocess

import pytest
import yaml

from sparsex_jax import cli

SHELL = ("slurm.sh", "tpu_pod.sh")


@pytest.fixture
def flags(capsys):
    with pytest.raises(SystemExit):
        cli.run(["train", "--help"])
    return set(re.findall(r"--[a-z][a-z.-]*", capsys.readouterr().out))


def jobsets(project):
    return list(yaml.safe_load_all((project / "scripts" / "gke_jobset.yaml").read_text()))


def pod(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return job, container


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_parse(name, project):
    path = project / "scripts" / name
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
    assert path.stat().st_mode & 0o111


def test_flags_of_scripts_are_those_of_the_program(flags, project):
    commands = [pod(jobset)[1]["args"][0] for jobset in jobsets(project)]
    for name in SHELL:  # the commands of their headers
        text = (project / "scripts" / name).read_text()
        commands += re.findall(r"^#   \S*(?:sbatch|tpu_pod.sh) .*?(configs/.*)$", text, re.M)
    docs = (project / "docs" / "launching.md").read_text()
    commands += re.findall(r"^    \S*sparsex train (.*)", docs.replace("\\\n", ""), re.M)
    commands += re.findall(r"^    .*scripts/\S*(?:.sh) .*?(configs/.*)", docs, re.M)
    assert len(commands) == 7
    for command in commands:
        preset, _, options = command.removeprefix("exec .venv/bin/sparsex train ").partition(" ")
        assert (project / preset).is_file()
        used = set(re.findall(r"--[a-z][a-z.-]*", options))
        assert used and used <= flags, used - flags


def test_job_sets_are_as_large_as_they_say(project):
    gpu, tpu = jobsets(project)
    for jobset, size in ((gpu, 4), (tpu, 64)):
        job, container = pod(jobset)
        spec = job["template"]["spec"]
        assert (spec["parallelism"], spec["completions"]) == (size, size)
        assert spec["completionMode"] == "Indexed"
    job, container = pod(gpu)
    name = gpu["metadata"]["name"]
    assert f"--coordinator {name}-{job['name']}-0-0.{name}:" in container["args"][0]
    assert "--num-processes 4 " in container["args"][0]


def test_tpu_script_quotes_what_it_passes_on(project, tmp_path):
    (tmp_path / "gcloud").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "gcloud").chmod(0o755)
    command = [project / "scripts" / "tpu_pod.sh", "slice", "zone-a", "my preset.py", "--seed", "1"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == (
        "cd sparse-x && exec .venv/bin/sparsex train my\\ preset.py --seed 1"
    )
    failed = subprocess.run(command[:3], env=environment, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("sparsex: usage:")
