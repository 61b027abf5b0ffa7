"""A worker thread whose operators use no threads beside its own: what copies on a CPU beside the computing thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def one_thread_worker(name: str) -> ThreadPoolExecutor:
    """One worker that is one thread.

    With a second pool of OpenMP threads on the cores of the first, every parallel region of both waits for the scheduler: kernels of the computing
    thread took up to five times as long as without it.

    Args:
        name: of its thread.
    """
    own = torch.get_num_threads()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    worker.submit(
        torch.get_num_threads
    ).result()  # a thread takes the number of others when torch is first asked in it, and would do so later
    worker.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(own)  # the call before has set this thread's, too; the worker keeps its one
    return worker
