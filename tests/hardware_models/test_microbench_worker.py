"""Workers of one thread beside a computing thread."""

from __future__ import annotations

from threading import Thread

import torch

from hardware_models.microbench_worker import one_thread_worker


def test_a_worker_is_one_thread_and_others_keep_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread_worker("lane") as worker:
            assert worker.submit(torch.get_num_threads).result() == 1
            worker.submit(torch.mm, torch.ones(64, 64), torch.ones(64, 64)).result()
            assert worker.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
            later: list[int] = []
            thread = Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert later == [3]
    finally:
        torch.set_num_threads(before)
