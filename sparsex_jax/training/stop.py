"""Requests to stop: signals and a time limit."""

import signal
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsex_jax.training.errors import TrainingError


class StopRequest:
    """Context in which SIGTERM and SIGINT ask to stop instead of ending the process.

    A second signal acts as usual. Outside the main thread only the time limit counts.

    Args:
      max_minutes: wall-clock limit in minutes from construction; None for none.

    Raises:
      TrainingError: the limit is negative or no number.
    """

    def __init__(self, max_minutes: float | None = None):
        if max_minutes is not None and not max_minutes >= 0:
            raise TrainingError(
                f"max_minutes={max_minutes} must not be negative: leave it out for no limit"
            )
        self.reason: str | None = None
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._limit = max_minutes
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_):
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _on_signal(self, number, _):
        self.reason = signal.Signals(number).name
        self._restore()

    def requested(self) -> bool:
        """Whether to stop now; `reason` then says why.

        Of several processes all stop at the same step, as soon as one is asked to.
        """
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if self.reason is None and late:
            self.reason = f"max_minutes={self._limit:g}"
        if jax.process_count() == 1:
            return self.reason is not None
        asked = multihost_utils.process_allgather(np.array(self.reason is not None))
        if asked.any() and self.reason is None:
            self.reason = f"process {asked.argmax()}"
        return bool(asked.any())  # not by the reason, which a signal may have set since
