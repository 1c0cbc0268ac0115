"""Public entry points that compute the same whatever modes of torch surround the call.

Autocast, inference mode, a default device and ``torch.compile`` are the job's choices for its
model. The default dtype belongs to all threads and is left alone: every tensor made in this package
states its dtype (``tests/unit/test_factories.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.optim import Optimizer

from arg_dist.library_internals import AMP_SCALING, DISABLE_DYNAMO

P = ParamSpec("P")
T = TypeVar("T")

MARK = "__runs_plainly__"

with torch.device("meta"):
    KNOWS_CONTEXT = torch.get_default_device().type == "meta"
"""Whether torch says which default device ``with torch.device(...)`` has set: not torch 2.7, where
the question even fails once a default device was set and reset."""


@contextmanager
def plain_mode() -> Iterator[None]:
    """Switch off autocast, inference mode, gradients and the default device in this thread."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())  # last: leaving inference mode enables gradients
        for kind in _device_kinds():
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if not KNOWS_CONTEXT or torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


def entry_point(function: Callable[P, T]) -> Callable[P, T]:
    """Run a public function in :func:`plain_mode`, and eagerly: ``torch.compile`` breaks there."""

    @wraps(function)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> T:
        with plain_mode():
            return function(*args, **kwargs)

    decorated = eager(plainly)
    decorated.__dict__[MARK] = True
    return decorated


def is_entry_point(function: Callable[..., object]) -> bool:
    """Whether a function is decorated with :func:`entry_point`."""
    return MARK in vars(function)


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """A function that ``torch.compile`` calls instead of tracing it, as torch's optimizers are."""
    decorated: Callable[P, T] = DISABLE_DYNAMO.imported()(function)
    return decorated


def check_not_captured() -> None:
    """Check that no CUDA graph is being captured.

    Raises:
        RuntimeError: one is.
    """
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if initialized and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step: cannot be captured in a CUDA graph, because every step reads values on the host "
            "to decide what to compute; capture forward and backward only, and call step() after "
            "each replay"
        )


def expect_every_step(optimizer: Optimizer) -> None:
    """Make GradScaler call every step of an optimizer, for :func:`check_no_scaler` to refuse it.

    Otherwise it would leave out steps by a process's own gradient, for which the others would wait.
    """
    setattr(optimizer, AMP_SCALING.name, True)


def check_no_scaler(optimizer: Optimizer) -> None:
    """Check that no GradScaler decides on the steps of gradients that are not averaged.

    Raises:
        RuntimeError: one does.
    """
    if hasattr(optimizer, "found_inf") and AMP_SCALING.is_on(optimizer):
        raise RuntimeError(
            'gradient_sync="sketch": GradScaler leaves out a step where a process\'s own gradient '
            "overflows, and the others would wait for it; train in bf16, without a GradScaler, or "
            'leave gradient_sync at "engine"'
        )


def _device_kinds() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
