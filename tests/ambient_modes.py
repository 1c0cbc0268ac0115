"""Modes of torch that a job may have on while it calls the optimizer."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.installed import PRECISION_BY_BACKEND

PRECISIONS = [(where, what) for where in ("cuda", "mkldnn") for what in ("all", "matmul")]


@contextmanager
def setting(change: Callable[[Any], object], given: Any, before: Any) -> Iterator[None]:
    """A setting of the whole process, changed and put back."""
    change(given)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.set_default_dtype, dtype, torch.get_default_dtype())


def deterministic(*, fill: bool) -> AbstractContextManager[None]:
    def change(on: bool) -> None:
        torch.use_deterministic_algorithms(on)
        torch.utils.deterministic.fill_uninitialized_memory = fill if on else True

    return setting(change, True, False)


@contextmanager
def precision(change: Callable[[], object]) -> Iterator[None]:
    """Products in lower precision, by one of torch's interfaces."""
    change()
    try:
        yield
    finally:
        reset_precision()


def reset_precision() -> None:
    """All as when torch is imported."""
    torch.set_float32_matmul_precision("highest")
    if PRECISION_BY_BACKEND:
        for where, what in [("generic", "all"), *PRECISIONS]:
            torch._C._set_fp32_precision_setter(where, what, "none")


def set_precision(where: str, what: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(where, what, value)


def get_precision(where: str, what: str) -> str:
    return torch._C._get_fp32_precision_getter(where, what) if PRECISION_BY_BACKEND else "none"


def older_flag() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


@contextmanager
def errors() -> Iterator[None]:
    """Each warning is an error, those that torch gives once only too."""
    before = torch.is_warn_always_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)
        try:
            yield
        finally:
            torch.set_warn_always(before)


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def frozen_flags() -> AbstractContextManager[None]:
    """As torch's own tests are run: no flag may be assigned outside its context manager."""

    def change(allowed: bool) -> None:
        module = getattr(torch.backends, "m", torch.backends)
        module.__dict__["__allow_nonbracketed_mutation_flag"] = allowed

    return setting(change, False, True)


def conversion(name: str) -> AbstractContextManager[None]:
    return setting(
        getattr(torch.__future__, f"set_{name}_module_params_on_conversion"), True, False
    )


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp16": lambda: default_dtype(torch.float16),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensor hooks": torch.autograd.graph.save_on_cpu,
    "forward derivatives": torch.autograd.forward_ad.dual_level,
    "deterministic, memory filled": lambda: deterministic(fill=True),
    "deterministic": lambda: deterministic(fill=False),
    "precision high": lambda: precision(lambda: torch.set_float32_matmul_precision("high")),
    "precision medium": lambda: precision(lambda: torch.set_float32_matmul_precision("medium")),
    "allow_tf32": lambda: precision(older_flag),
    "oneDNN off": lambda: torch.backends.mkldnn.flags(enabled=False, allow_tf32=None),
    "oneDNN deterministic": lambda: torch.backends.mkldnn.flags(True, True, allow_tf32=None),
    "flags frozen": frozen_flags,
    "warnings are errors": errors,
    "function mode": SeesFunctions,
    "dispatch mode": SeesOperators,
    "flops counted": lambda: FlopCounterMode(display=False),
    "profiled": lambda: torch.autograd.profiler.profile(use_cpu=True),
    "tensors swapped": lambda: conversion("swap"),
    "tensors overwritten": lambda: conversion("overwrite"),
    "two threads": lambda: setting(torch.set_num_threads, 2, torch.get_num_threads()),
    "another seed": lambda: setting(torch.manual_seed, 123, 0),
}
if PRECISION_BY_BACKEND:
    MODES |= {
        "fp32_precision tf32": lambda: precision(lambda: set_precision("generic", "all", "tf32")),
        "oneDNN in bf16": lambda: precision(lambda: set_precision("mkldnn", "matmul", "bf16")),
    }


@contextmanager
def on(*names: str) -> Iterator[None]:
    """The modes of these names; what they set is found as it was left after each use."""
    with ExitStack() as modes:
        for name in names:
            modes.enter_context(MODES[name]())
        before = surroundings()
        yield
        after = surroundings()
        assert [key for key in before if after[key] != before[key]] == []


def surroundings() -> dict[str, Any]:
    """What the modes set, and the states of the random number generators."""
    return {
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cache": torch.is_autocast_cache_enabled(),
        "dtype": torch.get_default_dtype(),
        "function modes": _get_current_function_mode_stack(),
        "gradients": (torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": [get_precision(*each) for each in PRECISIONS],
        "older precision": older_precision(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "numpy": [str(part) for part in numpy.random.get_state()[2:]],
    }


def older_precision() -> list[Any]:
    """What torch's older flags say; it raises where they contradict the newer ones."""
    found: list[Any] = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError as error:
            found.append(str(error)[:40])
    return found
