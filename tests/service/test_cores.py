"""Threads that compute on numbers of cores of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from service.cores import use_cores


def test_what_another_thread_is_told_does_not_matter() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as engine, ThreadPoolExecutor(1) as search:
        engine.submit(use_cores, 2).result()
        search.submit(use_cores, 1).result()
        assert engine.submit(torch.get_num_threads).result() == 2
        assert search.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)  # for threads to come, too
