"""Copies of the optimizer: ``copy``, ``pickle``, ``torch.save`` and processes started with it.

A copy carries what the next step depends on and trains on as the original would. Layouts and
communicators belong to the processes that made them: a copy makes its own at its next step. As in
torch, hooks are not copied.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor

from arg_dist.backward import BackwardProjection
from arg_dist.binding import Binding
from arg_dist.config import settings_at_saving
from arg_dist.sharding.fragment import adapters
from arg_dist.state_dict import Ownership

CARRIED = (
    "_binding",
    "_ownership",
    "_budget",
    "_gradients_missing",
    "calls",
    "skipped_steps",
)
"""Attributes of the optimizer that a copy carries, beside those that torch copies."""

RENEWED = ("_has_stepped", "_backward")
"""Attributes that a copy makes anew."""

REMEDY = (
    "save optimizer.state_dict(), or a checkpoint with arg_dist.checkpoint.save, and load it into "
    "a new optimizer"
)


class CopiedOptimizer(torch.optim.Optimizer):
    """The part of :class:`arg_dist.AdaRankGrad` that is copied and pickled.

    Raises:
        RuntimeError: from every way to copy: an engine has replaced the parameters by tensors of
            its own, or shards them (a shallow copy shares these), or the copy is pickled and
            `process_group` cannot be; or, when unpickled, another version has written the pickle.
    """

    _binding: Binding
    _ownership: Ownership
    calls: int

    def __getstate__(self) -> dict[str, Any]:
        """The contents of a pickle."""
        processes = self._binding.process_group
        try:
            pickle.dumps(processes)
        except Exception as error:
            raise RuntimeError(
                f"process_group: got a {type(processes).__name__}, with which the optimizer "
                f"cannot be pickled ({error}); {REMEDY}"
            ) from error
        self._refuse_sharded()
        return self._carried()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill a copy; torch also calls this with the state and groups that it has loaded."""
        if "_binding" in vars(self):
            super().__setstate__(state)
            return
        missing = [key for key in CARRIED if key not in state]
        if missing:
            raise RuntimeError(
                f"AdaRankGrad: this pickle was written by another version of arg_dist and has no "
                f"{', '.join(missing)}; with that version, {REMEDY}"
            )
        super().__setstate__(state)
        for settings in (self.defaults, *self.param_groups):
            saved = settings_at_saving(settings, "unpickled optimizer")
            settings.clear()
            settings.update(saved)
        self._binding.every_group = self.param_groups
        self._has_stepped = False
        self._backward = BackwardProjection.of(self)
        if not self.calls:
            for adapter in adapters():
                adapter.on_construction(self)

    def __copy__(self) -> CopiedOptimizer:
        """A copy that shares parameters and state with the original, as in torch."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self._carried())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedOptimizer:
        """A copy with its own parameters and state, in the same group of processes."""
        self._refuse_sharded()
        carried = self._carried()
        processes = self._binding.process_group
        memo[id(processes)] = processes
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(carried, memo))
        return twin

    def _carried(self) -> dict[str, Any]:
        """What a copy carries."""
        self._refuse_replaced()
        plans = list(self._binding.every_plan())
        carried = {**super().__getstate__(), **{key: getattr(self, key) for key in CARRIED}}
        ownership = self._ownership.carried(self.state, plans)
        return {**carried, "_binding": self._binding.twin(), "_ownership": ownership}

    def _refuse_replaced(self) -> None:
        """Refuse to copy parts of parameters that only an engine can put together again."""
        own = {id(parameter) for parameter in self._binding.parameters.values()}
        for position, group in enumerate(self.param_groups):
            is_emptied = not group["params"] and group["param_names"]
            if is_emptied or any(id(target) not in own for target in group["params"]):
                held = ", ".join(_described(target) for target in group["params"][:2]) or "nothing"
                raise RuntimeError(
                    f"AdaRankGrad: an engine has replaced the parameters of group {position} (it "
                    f"holds {held} now), so a copy could not train a copy of the model; {REMEDY}"
                )

    def _refuse_sharded(self) -> None:
        """Refuse to copy this process's parts of parameters; models of them are not copied."""
        for name, parameter in self._binding.parameters.items():
            if hasattr(parameter, "to_local"):
                raise RuntimeError(
                    f"AdaRankGrad: {name} is sharded over processes, and neither it nor its model "
                    f"can be copied; {REMEDY}"
                )


def _described(target: Tensor) -> str:
    return f"a {type(target).__name__} of shape {tuple(target.shape)}"
