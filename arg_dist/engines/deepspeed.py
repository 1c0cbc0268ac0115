"""DeepSpeed ZeRO: which fragment of which parameter lies in the flat tensors it hands an optimizer.

Stage 0 trains the parameters themselves or fp32 copies of them, and needs no adapter of its own
(``replicated.py``). Stages 1 and 2 lay a group's parameters end to end and give each process an
equal cut; stage 3 cuts every parameter by itself and lays the pieces of a sub-group end to end. The
positions used here are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arg_dist.groups import full_shape
from arg_dist.sharding.fragment import (
    ADAPTERS,
    Adapter,
    Fragment,
    Holding,
    ParameterGroup,
    StepCall,
)


class FlatPartitionAdapter(Adapter):
    """Stages 1 and 2: the parameters are views of one long tensor, the target is a cut of it.

    A parameter's storage offset *is* its place in the long tensor, also with
    ``round_robin_gradients``, where DeepSpeed's own map is wrong, and with ``parameter_alignment``.
    """

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the group holds one flat tensor that is a cut of another."""
        return _is_flat(group) and any(hasattr(p, "_dp_group") for _, p in group.alive())

    def on_construction(self, optimizer: Any) -> None:
        """Lets DeepSpeed, if it is or will be in use, know the optimizer."""
        from arg_dist.engines.deepspeed_guard import expect, introduce

        expect(optimizer)
        # accelerate and the Trainer import DeepSpeed late, and say before that they will
        if "deepspeed" in sys.modules or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            introduce(type(optimizer))

    def hold(self, group: ParameterGroup) -> Holding:
        """The part of each parameter that falls into this process's cut.

        Raises:
            RuntimeError: the cut does not hold the parameters' values.
        """
        flat = group.targets[0]
        # which parameters it trains, DeepSpeed chose at its start, whatever is frozen now
        members = [(name, p) for name, p in group.alive() if hasattr(p, "_dp_group")]
        process_group = members[0][1]._dp_group
        first = dist.get_rank(process_group) * flat.numel()
        last = first + flat.numel()
        fragments = []
        for name, parameter in members:
            offset = int(parameter.data.storage_offset())
            low = max(offset, first)
            high = max(low, min(offset + parameter.numel(), last))
            start, stop = (low - offset, high - offset) if low < high else (0, 0)
            fragment = _fragment(name, tuple(parameter.shape), start, stop, flat, low - first)
            _check_values(fragment, parameter)
            fragments.append(fragment)
        return Holding(fragments, process_group)

    def step_calls(self, groups: Sequence[ParameterGroup]) -> list[StepCall] | None:
        """One group at a time."""
        if not any(self.recognizes(group) for group in groups):
            return None
        return [[(i, group.targets)] for i, group in enumerate(groups)]

    def weights_loaded(self, optimizer: Any) -> None:
        """The weights that the model computes with follow the fp32 ones."""
        from arg_dist.engines.deepspeed_guard import wrapper_of

        wrapper = wrapper_of(optimizer)
        if hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()
        elif hasattr(wrapper, "fp32_groups"):  # stage 0 with copies
            for copies, originals in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for copy, original in zip(copies, originals, strict=True):
                    original.data.copy_(copy.data)


class PartitionedParametersAdapter(Adapter):
    """Stage 3: process `i` holds the `i`-th of N equal pieces of each parameter, padded."""

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the group holds one flat tensor, and its parameters are partitioned."""
        return _is_flat(group) and any(hasattr(p, "_z3_optimizer") for _, p in group.alive())

    def hold(self, group: ParameterGroup) -> Holding:
        """This process's piece of each parameter of the sub-group.

        Raises:
            RuntimeError: the flat tensor is none of DeepSpeed's sub-groups.
        """
        flat = group.targets[0]
        names = {id(parameter): name for name, parameter in group.alive()}
        zero: Any = next(p._z3_optimizer for _, p in group.alive() if hasattr(p, "_z3_optimizer"))
        flats = zero.fp32_partitioned_groups_flat
        place = next((i for i, tensor in enumerate(flats) if tensor is flat), None)
        if place is None:
            raise RuntimeError(
                f"a flat tensor of {flat.numel()} elements was found in the parameter group "
                "that is none of DeepSpeed's sub-groups; this version of DeepSpeed is not "
                "supported (tested: 0.19.8)"
            )
        members = zero.fp16_groups[place]
        process_group = members[0].ds_process_group
        me = dist.get_rank(process_group)
        fragments = []
        for parameter in members:
            offset = zero.grad_position[zero.get_param_id(parameter)][1]
            piece, numel = parameter.partition_numel(), parameter.ds_numel
            start = min(me * piece, numel)
            stop = min(start + piece, numel)
            name, shape = names[id(parameter)], full_shape(parameter)
            fragments.append(_fragment(name, shape, start, stop, flat, offset))
        return Holding(fragments, process_group)

    def step_calls(self, groups: Sequence[ParameterGroup]) -> list[StepCall] | None:
        """One sub-group at a time; between the calls, the groups are empty."""
        zero = next(
            (p._z3_optimizer for g in groups for _, p in g.alive() if hasattr(p, "_z3_optimizer")),
            None,
        )
        if zero is None:
            return None
        flats = zero.fp32_partitioned_groups_flat
        return [[(zero.sub_group_to_group_id[i], [flat])] for i, flat in enumerate(flats)]

    def untrained(self, name: str, parameter: Tensor) -> Holding | None:
        """This process's piece."""
        if not hasattr(parameter, "ds_tensor"):
            return None
        partitioned: Any = parameter
        me, piece = dist.get_rank(partitioned.ds_process_group), partitioned.partition_numel()
        start = min(me * piece, partitioned.ds_numel)
        stop = min(start + piece, partitioned.ds_numel)
        shape = full_shape(parameter)
        piece_held = _fragment(name, shape, start, stop, partitioned.ds_tensor, 0)
        return Holding([piece_held], partitioned.ds_process_group)

    def weights_loaded(self, optimizer: Any) -> None:
        """The pieces that the model computes with follow the fp32 ones."""
        from arg_dist.engines.deepspeed_guard import wrapper_of

        zero = wrapper_of(optimizer)
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            zero.checkpoint_event_prologue()
            for i in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            zero.checkpoint_event_epilogue()


def _is_flat(group: ParameterGroup) -> bool:
    return (
        len(group.targets) == 1
        and group.targets[0].dim() == 1
        and not any(group.targets[0] is parameter for parameter in group.parameters)
    )


def _fragment(
    name: str, shape: tuple[int, ...], start: int, stop: int, flat: Tensor, position: int
) -> Fragment:
    """Elements ``[start, stop)`` of a parameter, found at `position` of the flat tensor."""
    numel = stop - start
    position = position if numel else 0
    return Fragment(name, shape, start, stop, flat, lambda t: t.narrow(0, position, numel))


def _check_values(fragment: Fragment, parameter: Tensor) -> None:
    """The fp32 values must be the parameter's own: DeepSpeed's layout is not ours to trust."""
    ours = fragment.view(fragment.target.data).to(parameter.device, parameter.dtype)
    theirs = parameter.data.reshape(-1)[fragment.start : fragment.stop]
    if not torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"{fragment.name}: DeepSpeed's fp32 partition does not hold this parameter's values "
            "where its storage says; this version of DeepSpeed is not supported (tested: 0.19.8)"
        )


ADAPTERS.insert(0, FlatPartitionAdapter())
ADAPTERS.insert(0, PartitionedParametersAdapter())
