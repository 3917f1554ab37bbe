"""Requests to stop: signals and a time limit."""

import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

from sparsex_jax.training.errors import TrainingError


class StopRequest:
    """Context in which SIGTERM and SIGINT ask to stop instead of ending the process.

    A second signal acts as usual. Outside the main thread only the time limit counts. Of several
    processes all stop after the same step, whichever of them is asked to: SIGTERM, the first and
    any other, is noticed by JAX's preemption service, which agrees on the step.

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
        self._several = self._passed_on = False

    def __enter__(self) -> "StopRequest":
        self._several = jax.distributed.is_initialized()
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            for number in signals[1:] if self._several else signals:
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

    def requested(self, step: int) -> bool:
        """Whether to stop now; `reason` then says why.

        Args:
          step: of several processes, each has to ask before each step, and has its number.
        """
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if self.reason is None and late:
            self.reason = f"max_minutes={self._limit:g}"
        if not self._several:
            return self.reason is not None
        if self.reason is not None and not self._passed_on:
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        stops = multihost_utils.reached_preemption_sync_point(step)
        if stops and self.reason is None:
            self.reason = "a signal to, or the time limit of, one of the processes"
        return stops
