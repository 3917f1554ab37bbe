"""Processes that make batches."""

import ctypes
import signal
import sys

import grain
from absl import flags

_BATCHES_AHEAD = 2  # of each process
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def in_workers(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same batches in the same order, made by so many processes, at least one."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads some of its own
    options = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=_BATCHES_AHEAD
    )
    return batches.mp_prefetch(options, worker_init_fn=_begin)


def _begin(*_) -> None:
    """A worker ends with the process that trains, not by the signals that ask that one to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
