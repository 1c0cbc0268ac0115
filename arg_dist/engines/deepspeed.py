"""DeepSpeed ZeRO: locate the parameters' fragments in the flat tensors passed to the optimizer.

Stage 0 trains the parameters themselves, or fp32 copies of them, and needs no adapter of its own
(``replicated.py``). Stages 1 and 2 concatenate the parameters of a group and give each process an
equal partition. Stage 3 partitions each parameter separately and concatenates the partitions of a
sub-group. The offsets used here are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from torch import Tensor

from arg_dist.engines.deepspeed_guard import (
    expect,
    has_stepped,
    introduce,
    refuse_unguarded,
    wrapper_of,
)
from arg_dist.engines.replicated import changed_weights, same_values
from arg_dist.library_internals import (
    DEEPSPEED,
    MASTER_WEIGHTS,
    PARTITION_GROUP,
    UPDATE_PARTITION,
    ZERO_3,
)
from arg_dist.sharding.fragment import (
    Adapter,
    Fragment,
    Holding,
    ParameterGroup,
    StepCall,
)
from arg_dist.uses import full_shape


class FlatPartitionAdapter(Adapter):
    """Stages 1 and 2: the parameters are views of one flat tensor, the target is a partition of it.

    A parameter's storage offset is its position in the flat tensor. This also holds with
    ``parameter_alignment`` and with ``round_robin_gradients``, where DeepSpeed's own map is wrong.
    """

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the group holds one flat tensor that is a partition of another."""
        return _is_flat(group) and any(PARTITION_GROUP.is_on(p) for _, p in group.alive())

    def on_construction(self, optimizer: Any) -> None:
        """Registers the optimizer with DeepSpeed, if that is or will be in use."""
        expect(optimizer)
        # accelerate and the Trainer announce DeepSpeed in the environment and import it later
        if DEEPSPEED.is_imported or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            introduce(type(optimizer))

    def on_first_step(self, optimizer: Any) -> None:
        """Records that the optimizer is in use."""
        has_stepped(optimizer)

    def hold(self, group: ParameterGroup) -> Holding:
        """Returns the part of each parameter that is in this process's partition.

        Raises:
            RuntimeError: the partition does not hold the parameters' values.
        """
        refuse_unguarded()
        flat = group.targets[0]
        # DeepSpeed chose the trained parameters at initialization; requires_grad may differ now
        members = [(name, p) for name, p in group.alive() if PARTITION_GROUP.is_on(p)]
        process_group = PARTITION_GROUP.of(members[0][1])
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
        """DeepSpeed steps one group at a time."""
        if not any(self.recognizes(group) for group in groups):
            return None
        return [[(i, group.targets)] for i, group in enumerate(groups)]

    def weights_loaded(self, optimizer: Any) -> None:
        """Copies the fp32 master weights to the weights that the model computes with."""
        wrapper = wrapper_of(optimizer)
        if hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()
        elif hasattr(wrapper, "fp32_groups"):  # stage 0 with fp32 copies
            for copies, originals in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for copy, original in zip(copies, originals, strict=True):
                    original.data.copy_(copy.data)


class PartitionedParametersAdapter(Adapter):
    """Stage 3: process `i` holds the `i`-th of N equal partitions of each parameter, padded."""

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the group holds one flat tensor, and its parameters are partitioned."""
        return _is_flat(group) and _zero_3(group) is not None

    def hold(self, group: ParameterGroup) -> Holding:
        """Returns this process's partition of each parameter of the sub-group.

        Raises:
            RuntimeError: the flat tensor does not belong to a sub-group of DeepSpeed's, or does not
                hold the parameters' values.
        """
        refuse_unguarded()
        flat = group.targets[0]
        names = {id(parameter): name for name, parameter in group.alive()}
        zero = _zero_3(group)
        flats = zero.fp32_partitioned_groups_flat
        place = next((i for i, tensor in enumerate(flats) if tensor is flat), None)
        if place is None:
            raise RuntimeError(
                f"a flat tensor of {flat.numel()} elements in the parameter group is none of "
                "DeepSpeed's sub-groups: the optimizer's groups were changed after "
                f"deepspeed.initialize, or {_version()} keeps its fp32 weights elsewhere"
            )
        members = zero.fp16_groups[place]
        process_group = members[0].ds_process_group
        me = dist.get_rank(process_group)
        fragments = []
        for parameter in members:
            offset = zero.grad_position[zero.get_param_id(parameter)][1]
            length, numel = parameter.partition_numel(), parameter.ds_numel
            start = min(me * length, numel)
            stop = min(start + length, numel)
            name, shape = names[id(parameter)], full_shape(parameter)
            fragment = _fragment(name, shape, start, stop, flat, offset)
            _check_partition(fragment, parameter.ds_tensor)
            fragments.append(fragment)
        return Holding(fragments, process_group)

    def step_calls(self, groups: Sequence[ParameterGroup]) -> list[StepCall] | None:
        """DeepSpeed steps one sub-group at a time and leaves the groups empty between calls."""
        zero = next((zero for zero in map(_zero_3, groups) if zero is not None), None)
        if zero is None:
            return None
        flats = zero.fp32_partitioned_groups_flat
        return [[(zero.sub_group_to_group_id[i], [flat])] for i, flat in enumerate(flats)]

    def untrained(self, name: str, parameter: Tensor) -> Holding | None:
        """Returns this process's partition."""
        if not hasattr(parameter, "ds_tensor"):
            return None
        partitioned: Any = parameter
        me, length = dist.get_rank(partitioned.ds_process_group), partitioned.partition_numel()
        start = min(me * length, partitioned.ds_numel)
        stop = min(start + length, partitioned.ds_numel)
        shape = full_shape(parameter)
        held = _fragment(name, shape, start, stop, partitioned.ds_tensor, 0)
        return Holding([held], partitioned.ds_process_group)

    def weights_loaded(self, optimizer: Any) -> None:
        """Copies the fp32 master weights to the partitions that the model computes with."""
        zero = wrapper_of(optimizer)
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            zero.checkpoint_event_prologue()
            for i in range(len(zero.fp32_partitioned_groups_flat)):
                UPDATE_PARTITION.of(zero)(i)
            zero.checkpoint_event_epilogue()


def _is_flat(group: ParameterGroup) -> bool:
    return (
        len(group.targets) == 1
        and group.targets[0].dim() == 1
        and not any(group.targets[0] is parameter for parameter in group.parameters)
    )


def _zero_3(group: ParameterGroup) -> Any:
    """DeepSpeed's optimizer that partitions the group's parameters; None if none does."""
    return next((ZERO_3.of(p) for _, p in group.alive() if ZERO_3.is_on(p)), None)


def _fragment(
    name: str, shape: tuple[int, ...], start: int, stop: int, flat: Tensor, position: int
) -> Fragment:
    """Describes elements ``[start, stop)`` of a parameter, at `position` in the flat tensor."""
    numel = stop - start
    position = position if numel else 0
    return Fragment(name, shape, start, stop, flat, lambda t: t.narrow(0, position, numel))


def _check_values(fragment: Fragment, parameter: Tensor) -> None:
    """Checks that the fp32 values equal the parameter's, as DeepSpeed's layout is not public."""
    ours = fragment.view(fragment.target.data)
    if same_values(ours, parameter.data.reshape(-1)[fragment.start : fragment.stop]):
        return
    mapped = getattr(MASTER_WEIGHTS.get(parameter), "hp_fragment", None)
    if mapped is not None and mapped.data_ptr() == ours.data_ptr():
        raise RuntimeError(changed_weights(fragment.name))
    raise RuntimeError(
        f"{changed_weights(fragment.name)}. If the weights were not changed, {_version()} places "
        "them differently in its partitions"
    )


def _check_partition(fragment: Fragment, partition: Tensor) -> None:
    """Checks that the fp32 values equal those of the partition that the model computes with."""
    theirs = partition.data.reshape(-1)[: fragment.stop - fragment.start]
    ours = fragment.view(fragment.target.data)
    # a partition that is swapped out is empty
    if theirs.numel() == ours.numel() and not same_values(ours, theirs):
        raise RuntimeError(changed_weights(fragment.name))


def _version() -> str:
    return f"DeepSpeed {version('deepspeed')} (tested: {DEEPSPEED.tested})"
