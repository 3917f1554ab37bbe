"""Keeps processes that train together from waiting for one that is gone."""

import atexit
import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Exit status of a process that ends because of another (EX_TEMPFAIL: try again).
LOST = 75
DAY_MS = 86_400_000  # to wait for others as long as the watch lets us
_ALIVE, _FAILED = "sparsex/state/alive/", "sparsex/state/failed"
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, and which one this is.

    Attributes:
      address: host:port where process 0 listens.
      size: how many there are.
      number: of this one, from 0.
      local_device: the only device of its host that it uses; None for all.
    """

    address: str
    size: int
    number: int
    local_device: int | None = None


class Watch:
    """Shows the other processes that this one lives, and ends it when one of them does not.

    Each process writes a sign of life into the key-value store of JAX's coordination service and
    reads those of all others, from a thread, so that it works while the main thread hangs in a
    collective. JAX's own heartbeats, some seconds slower, are the second net: they end a process
    by SIGABRT, for which there is a handler with the same message. A process whose interpreter
    hangs is ended by `faulthandler`, which needs no interpreter.

    Args:
      group: the processes.
      start_seconds: how long JAX waits at the start for all of them.
      silent_seconds: a process without a sign of life for so long counts as lost.
      stall_seconds: so long may the main thread wait for one thing (`waiting_for`).
    """

    def __init__(self, group: Group, start_seconds: int, silent_seconds: int, stall_seconds: int):
        self.group, self.start_seconds, self.silent_seconds = group, start_seconds, silent_seconds
        self.stall_seconds = stall_seconds
        self.period = min(2.0, silent_seconds / 10)
        # Of JAX's heartbeats, the last of which is up to a fifth older than the end: later
        # than our own message and the time in which process 0 lets the others read it.
        self.runtime_seconds = round(1.25 * (silent_seconds + 5 * self.period))
        self.last_step: Callable[[], int | None] | None = None
        self._client: Any = None
        self._waiting: tuple[str, float] | None = None  # for what, since when
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._failing, self._own_error = False, ""
        now = time.monotonic()
        self._contact = now  # when process 0 answered last
        # By process: its last sign, when it came, the name of its host.
        self._signs = {n: ("", now, "") for n in range(group.size) if n != group.number}
        self._failure: tuple[str, float] | None = None  # of another process, and since when known
        self._threads: list[threading.Thread] = []
        self._last_words = _Handler(self._on_abort)
        # From C, for abort() ends the process before a handler of Python's would be called.
        self._libc = ctypes.CDLL(None)
        self._libc.signal.restype = ctypes.c_void_p
        self._libc.signal(signal.SIGABRT, self._last_words)

    def begin(self, client: Any) -> None:
        """Starts to watch; all processes have met.

        Args:
          client: of JAX's coordination service.
        """
        self._client = client
        now = time.monotonic()
        self._contact = now
        self._signs = {number: ("", now, "") for number in self._signs}
        for run in (self._exchange, self._judge):
            self._threads.append(threading.Thread(target=run, daemon=True))
            self._threads[-1].start()

    def _exchange(self) -> None:
        """Writes signs of life and reads them, until it is told to stop."""
        count, host = 0, socket.gethostname()
        while not self._stopped.is_set():
            count += 1
            try:
                self._client.key_value_set(
                    f"{_ALIVE}{self.group.number}", f"{count} {host}", allow_overwrite=True
                )
                found = self._client.key_value_dir_get("sparsex/state/")
            except Exception:  # the client has no type for what can go wrong; the judge counts
                self._stopped.wait(self.period)
                continue
            self._contact = now = time.monotonic()
            for key, value in found:
                self._note(key, value, now)
            faulthandler.dump_traceback_later(self.runtime_seconds, exit=True)
            self._stopped.wait(self.period)

    def _note(self, key: str, value: str, now: float) -> None:
        if key.endswith(_FAILED):
            number, _, text = value.partition(" ")
            if int(number) != self.group.number and self._failure is None:
                self._failure = (text, now)
            return
        number = key.rpartition("/")[2]
        sign, _, host = value.partition(" ")
        if int(number) in self._signs and self._signs[int(number)][0] != sign:
            self._signs[int(number)] = (sign, now, host)

    def _judge(self) -> None:
        """Ends this process when another one is lost or has failed."""
        last = time.monotonic()
        while not self._stopped.wait(self.period / 2):
            now = time.monotonic()
            if now - last > self.silent_seconds / 2:  # it is this process that was held up
                self._contact = now
                self._signs = {n: (sign, now, host) for n, (sign, _, host) in self._signs.items()}
            last = now
            if now - self._contact > self.silent_seconds:
                self.end(self._lost(0))
            silent = self._silent(self.silent_seconds)
            if silent is not None and self.group.number != silent:
                self.end(self._lost(silent))
            waiting = self._waiting
            stalled = waiting is not None and now - waiting[1] > self.stall_seconds
            if waiting is not None and stalled and self._failure is None:
                self._stalled(waiting[0])
            grace = self.period + 1  # in which this process may fail in the same way
            if self._failure is not None and not self._failing and now - self._failure[1] > grace:
                self.end(self._failure[0])

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Says that the main thread waits for something."""
        self._waiting = what, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def _stalled(self, what: str) -> None:
        """Ends all processes because this one waits too long; shows where."""
        name = f"process {self.group.number} of {self.group.size}"
        message = f"{name} has waited {self.stall_seconds} s for {what}: {self._advice()}"
        self._publish(message)
        faulthandler.dump_traceback()
        self.end(message)

    def _silent(self, seconds: float) -> int | None:
        """A process that gave no sign for so long; None if there is none, or nobody can know."""
        now = time.monotonic()
        if now - self._contact > 3 * self.period:
            return None
        silent = [n for n, (_, when, _) in self._signs.items() if now - when > seconds]
        return silent[0] if silent else None

    def _lost(self, number: int, seconds: float | None = None) -> str:
        """What to say about a process that does not answer."""
        host = self._signs[number][2] if number in self._signs else ""
        name = f"process {number} of {self.group.size}"
        where = f" on {host}" if host else ""
        if number == 0:
            where += f" at {self.group.address}"
        waited = self.silent_seconds if seconds is None else seconds
        return f"{name}{where} has not answered for {waited:.0f} s: {self._advice()}"

    def _advice(self) -> str:
        step = None
        if self.last_step is not None:
            with contextlib.suppress(OSError):
                step = self.last_step()
        then = "begins anew, for it has no checkpoint" if step is None else (
            f"resumes from step {step}"
        )  # fmt: skip
        return f"restart all processes with the same command; the run {then}"

    def end(self, message: str) -> None:
        """Ends this process because of another one; does not return."""
        if not self._ending.acquire(blocking=False):
            while True:  # until the thread that came first has ended the process
                time.sleep(1)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        message = " ".join((self._own_error or message).split())
        os.write(2, f"\nsparsex: {message}\n".encode())
        if self.group.number == 0 and self._client is not None:
            # Process 0 keeps the signs: the others are to read in peace what has happened.
            self._publish(message)
            time.sleep(3 * self.period)
        os._exit(LOST)

    def _publish(self, message: str) -> str:
        """Tells all processes what has failed; returns what was told first."""
        text = f"{self.group.number} {message}"
        with contextlib.suppress(Exception):  # somebody was faster, or process 0 is gone
            self._client.key_value_set(_FAILED, text)
        with contextlib.suppress(Exception):
            text = self._client.key_value_try_get(_FAILED)
        return text

    def failed(self, error: BaseException) -> None:
        """Tells the others that this process ends by an error.

        Ends it at once where the error is only what came of another one's end.
        """
        if self._failing:
            return
        self._failing = True
        what = " ".join((str(error) or type(error).__name__).split())[:500]
        message = f"process {self.group.number} of {self.group.size} stopped: {what}"
        since, seconds = time.monotonic(), min(5 * self.period + 1, self.silent_seconds)
        # An error of communication comes before anybody can know whose end it was.
        while time.monotonic() < since + seconds and self._failure is None:
            if all(when > since + self.period for _, when, _ in self._signs.values()):
                break
            time.sleep(self.period / 4)
        silent = self._silent(seconds - self.period)
        if silent is not None:
            self.end(self._lost(silent, time.monotonic() - self._signs[silent][1]))
        first, _, told = self._publish(message).partition(" ")
        if int(first) != self.group.number and not told.endswith(f" stopped: {what}"):
            self.end(told)
        self._own_error = message
        if self.group.number == 0:
            time.sleep(3 * self.period + 2)  # the others are to read it
        status = 130 if isinstance(error, KeyboardInterrupt) else 2
        # JAX would wait for the others, which end in their own ways.
        atexit.register(lambda: _leave(1 if hasattr(sys, "last_exc") else status))

    def finish(self, shutdown: Callable[[], None]) -> None:
        """Returns when all processes are done; ends this one when one is lost before.

        Args:
          shutdown: ends JAX's part.
        """
        self._client.wait_at_barrier("sparsex/end", DAY_MS)
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        shutdown()
        self._libc.signal(signal.SIGABRT, None)

    def _on_abort(self, _: int) -> None:
        """Says why JAX's runtime ends this process; returns where something else does."""
        if self._ending.locked():
            os._exit(LOST)
        group = self.group
        if self._client is None:
            self.end(
                f"process {group.number} of {group.size} has waited {self.start_seconds} s at"
                f" {group.address}, and not all of the others came: see which of them were not"
                f" started or ended with an error, and that each has its own number; then start"
                f" all {group.size} again"
            )
        if self._failure is not None:
            self.end(self._failure[0])
        silent = self._silent(self.silent_seconds)
        if silent is not None:
            self.end(self._lost(silent))
        if group.number != 0 and not self._answers():
            self.end(f"process 0 of {group.size} at {group.address} has ended: {self._advice()}")

    def _answers(self) -> bool:
        """Whether anything listens where process 0 should."""
        host, _, port = self.group.address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=3):
                return True
        except OSError:
            return False


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
