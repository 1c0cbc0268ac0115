"""Processes of one attempt agree on a name, whatever earlier ones left in the launcher's store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from launchers.pretraining.rendezvous import agree_on_a_name, init_method

pytestmark = pytest.mark.unit


def attempt(store: dist.Store, processes: int) -> list[str]:
    """The names that the processes of one attempt get."""
    with ThreadPoolExecutor(processes) as threads:
        names = [
            threads.submit(agree_on_a_name, store, process, processes, 20.0)
            for process in reversed(range(processes))
        ]
        return [name.result() for name in names]


def test_every_attempt_has_a_name_of_its_own_even_with_fewer_processes() -> None:
    store = dist.HashStore()
    names = [set(attempt(store, processes)) for processes in (4, 4, 1, 3)]
    assert [len(each) for each in names] == [1] * 4 and len(set.union(*names)) == 4


def test_a_process_that_has_died_since_is_not_counted() -> None:
    store = dist.HashStore()
    with pytest.raises(RuntimeError):  # process 1 asks, and nobody answers it
        agree_on_a_name(store, 1, 2, seconds=0.2)
    with pytest.raises(RuntimeError, match=r"1 of 2 processes arrived within 0\.2 s"):
        agree_on_a_name(store, 0, 2, seconds=0.2)
    assert len(set(attempt(store, 2))) == 1


def test_other_launchers_meet_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert init_method() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert init_method() == init_method() == "argdist://"
