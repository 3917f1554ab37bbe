"""For the tests of commands: running them here."""

import pytest

from sparsex_jax import cli


@pytest.fixture
def run(capsys):
    """Runs a command: exit status, and what it printed."""

    def run(*arguments):
        status = cli.run([*map(str, arguments)])
        return status, capsys.readouterr()

    return run
