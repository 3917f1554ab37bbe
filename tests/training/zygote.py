"""Runs of the tiny model as processes, forked from one that has imported all they need.

Importing takes longer than the runs. `python -m tests.training.zygote` reads a line of JSON for
each run and answers with its process id; `Zygote` starts it and talks to it.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Zygote:
    """Starts runs.

    Args:
      folder: for what they print.
      environment: of all of them, beside that of this process.
    """

    def __init__(self, folder, environment):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.zygote"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments, environment):
        """A run with these arguments of `tests.training.tiny`, in a process group of its own."""
        self.count += 1
        paths = {
            name: str(self.folder / f"{self.count}.{name}")
            for name in ("stdout", "stderr", "status")
        }
        request = {"arguments": arguments, "environment": environment, **paths}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Run(int(self.process.stdout.readline()), paths)

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Run:
    """A run, with what is needed of subprocess.Popen."""

    def __init__(self, pid, paths):
        self.pid, self.returncode = pid, None
        self._paths = {name: Path(path) for name, path in paths.items()}

    def poll(self):
        if self.returncode is None and self._paths["status"].exists():
            self.returncode = int(self._paths["status"].read_text())
        return self.returncode

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["tiny"], timeout, *self._output())
            time.sleep(0.01)
        return self.returncode

    def _output(self):
        return [self._paths[name].read_text() for name in ("stdout", "stderr")]

    def communicate(self, timeout=120):
        self.wait(timeout)
        return tuple(self._output())

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _fork():
    with warnings.catch_warnings():
        # JAX and Python warn of threads, of which there are none but idle ones of BLAS.
        warnings.simplefilter("ignore")
        return os.fork()


def _serve():
    """Forks for each request; returns in the process of a run, and at the end of the requests."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in iter(sys.stdin.readline, ""):
        if _fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request = json.loads(line)
        if pid := _fork():  # waits for the run, whose parent it has to be for that
            print(pid, flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            fresh = Path(request["status"] + ".tmp")
            fresh.write_text(str(status))
            fresh.replace(request["status"])
            os._exit(0)
        os.setsid()
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(request["environment"])
        return request["arguments"]
    return None


def main():
    from tests.training import tiny

    arguments = _serve()
    if arguments is not None:
        sys.argv[1:] = arguments
        tiny.main()


if __name__ == "__main__":
    main()
