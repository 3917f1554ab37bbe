"""Processes that make batches."""

import multiprocessing
import os
import signal
import threading

import grain
from absl import flags

_BATCHES_AHEAD = 2  # of each process


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
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Not Linux's PR_SET_PDEATHSIG: it kills where the *thread* ends that started the worker, which
    # is one of grain's, and a batch cut off on its way lets grain wait for the rest forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
