"""State packed for checkpoints that merge all processes by key: bytes, as many on each process.

Such checkpoints load tensors into tensors of the same size, so a new optimizer must know the sizes
in advance. Ranks differ from step to step; so the state of a matrix or tensor is padded to a size
that depends only on its shape, the largest rank and the number of processes:

========= =============================================================================
bytes     content
========= =============================================================================
8         length of the description
1016      description: JSON with numbers, and names, types and shapes of the tensors
the rest  the tensors, then zeros
========= =============================================================================

Beside it is a small tensor, equal on all processes, with what all of them must know when loading.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arg_dist.algorithm import momentum_bytes
from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.plan import Unit
from arg_dist.sharding.shares import as_share, own_share
from arg_dist.state_dict import Holder
from arg_dist.subspace.compact import row_bytes
from arg_dist.subspace.distributed import DimensionSharding, row_count
from arg_dist.subspace.state import OF_EACH_DIRECTION, State

FORM = "form"
"""Key of the small tensor: version, processes, bytes of each, steps taken, packed units."""
VERSION = 2
DESCRIPTION_BYTES = 1024
SCALARS = 8
"""Numbers that a state may hold as tensors of 8 bytes."""

SAME_NUMBER = (
    "start the same number of processes, or save with arg_dist.checkpoint, from which any number "
    "of processes can resume"
)


class Packed(NamedTuple):
    """What was packed.

    Attributes:
        calls: steps taken before it was saved.
        units: number of matrices and tensors that were packed together.
        state: the state; empty before the first gradient.
    """

    calls: int
    units: int
    state: State


def pack(
    unit: Unit,
    state: State,
    communicator: Communicator,
    settings: AdaRankGradConfig,
    *,
    calls: int,
    units: int,
) -> dict[str, Tensor]:
    """Pack this process's state of a matrix or tensor; every process packs, even if it has none.

    Args:
        unit: the matrix or tensor.
        state: its state on this process; empty if there is none.
        communicator: the processes.
        settings: settings of its parameter group.
        calls: steps taken so far.
        units: number of matrices and tensors that are packed.

    Raises:
        ConfigError: the state has a larger rank than the settings allow.
    """
    holder = (communicator.me, communicator.size)
    limit, rank = _limits(unit, settings)
    data = _to_bytes(state, holder, list(unit.fragment.parameter_shape))
    if data.numel() > limit:
        raise ConfigError(
            f"state_dict: the state of {unit.name} takes {data.numel()} bytes (rank "
            f"{state.get('rank')}), and {limit} are reserved, for ranks up to {rank}; "
            "torch.distributed.checkpoint needs sizes that a new optimizer knows in advance: save "
            "before max_rank is lowered or after the next refresh, or with arg_dist.checkpoint"
        )
    padded = torch.zeros(limit, dtype=torch.uint8, device="cpu")
    padded[: data.numel()] = data
    shared = as_share(padded, unit.fragment, communicator.group)
    form = torch.tensor(
        [VERSION, holder[1], limit, calls, units], dtype=torch.int64, device=shared.device
    )
    return {_key(holder[1], rank): shared, FORM: form}


def is_packed(unit: Mapping[str, Any]) -> bool:
    """Whether the entry of a matrix or tensor was written by :func:`pack`."""
    return FORM in unit


def unpack(unit: Mapping[str, Any], name: str, shape: tuple[int, ...], holder: Holder) -> Packed:
    """Unpack this process's state, without executing code.

    Args:
        unit: what :func:`pack` returned, with the shares of all processes or this one's.
        name: name of the matrix or tensor.
        shape: shape of its parameter.
        holder: this process.

    Raises:
        ConfigError: the entry has no state of `holder`, or belongs to another model or version.
    """
    version, processes, limit, calls, units = unit[FORM].tolist()
    if version != VERSION:
        raise ConfigError(
            f"load_state_dict: {name} was packed in form {version}, and this arg_dist reads "
            f"{VERSION}; use the version that wrote it"
        )
    if processes != holder[1]:
        raise ConfigError(
            f"load_state_dict: no state of {_process(holder)} was saved, but of "
            f"{_process((0, processes))} and the others; {SAME_NUMBER}"
        )
    shares = [own_share(value, holder) for key, value in unit.items() if key != FORM]
    if len(shares) != 1 or shares[0].numel() != limit:
        raise ConfigError(
            f"load_state_dict: the state of {name} has another size than when it was saved: it was "
            "saved with another max_rank, or for another shape; build the optimizer with the "
            "settings used at saving"
        )
    description, state = _from_bytes(shares[0].cpu(), name)
    if tuple(description["shape"]) != shape:
        raise ConfigError(
            f"load_state_dict: the saved state belongs to another model: {name} is of a parameter "
            f"of shape {shape}, and was of one of {tuple(description['shape'])}"
        )
    if tuple(description["process"]) != holder:
        raise ConfigError(
            f"load_state_dict: {name}: got the state of {_process(description['process'])} on "
            f"{_process(holder)}; each process must load its own"
        )
    return Packed(calls, units, state)


def _limits(unit: Unit, settings: AdaRankGradConfig) -> tuple[int, int | None]:
    """Bytes reserved on each process, and the largest rank of a matrix."""
    width = 8 if unit.fragment.target.dtype.is_complex else 4
    fixed = DESCRIPTION_BYTES + 8 * SCALARS
    most = {key: max(map(row_count, rows)) for key, rows in unit.sharding.stored().items()}
    if isinstance(unit.sharding, DimensionSharding):
        return fixed + width * sum(most.values()), None
    rank = settings.rank_bounds(min(unit.sharding.basis.size, unit.sharding.moment.size))[1]
    rows = sum(most[key] for key in OF_EACH_DIRECTION)
    direction = width * rows + 8  # of the spectrum, 8
    momentum = momentum_bytes(unit.sharding.elements.size, settings)
    scales = row_bytes(0, settings.state_dtype) * rows
    return fixed + rank * direction + momentum + scales, rank


def _key(processes: int, rank: int | None) -> str:
    """Name of the bytes; a checkpoint that does not fit lacks the key, and the error has it."""
    everyone = f"{_process((0, processes))}"
    if processes > 1:
        everyone += f" to {_process((processes - 1, processes))}"
    return everyone if rank is None else f"{everyone}, rank up to {rank}"


def _process(holder: Holder) -> str:
    return f"process {holder[0]} of {holder[1]}"


def _to_bytes(state: State, holder: Holder, shape: list[int]) -> Tensor:
    tensors = {
        key: torch.tensor(value, dtype=torch.float64, device="cpu")
        if isinstance(value, list)
        else value
        for key, value in state.items()
        if isinstance(value, (Tensor, list))
    }
    description = {
        "process": holder,
        "shape": shape,
        "numbers": {key: value for key, value in state.items() if key not in tensors},
        "lists": [key for key, value in state.items() if isinstance(value, list)],
        "tensors": [
            [key, str(value.dtype).removeprefix("torch."), list(value.shape)]
            for key, value in tensors.items()
        ],
    }
    text = json.dumps(description).encode()
    header = len(text).to_bytes(8, "little") + text
    pieces = [torch.frombuffer(bytearray(header.ljust(DESCRIPTION_BYTES)), dtype=torch.uint8)]
    pieces += [
        value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for value in tensors.values()
    ]
    if len(header) > DESCRIPTION_BYTES:
        raise ConfigError(
            f"state_dict: a state's numbers take {len(header)} bytes; {DESCRIPTION_BYTES} are "
            "reserved for torch.distributed.checkpoint; save with arg_dist.checkpoint"
        )
    return torch.cat(pieces)


def _from_bytes(data: Tensor, name: str) -> tuple[dict[str, Any], State]:
    header = data[:DESCRIPTION_BYTES].numpy().tobytes()
    try:
        description = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        state: State = dict(description["numbers"])
        start = DESCRIPTION_BYTES
        for key, dtype_name, shape in description["tensors"]:
            dtype = getattr(torch, dtype_name)
            stop = start + dtype.itemsize * math.prod(shape)
            state[key] = data[start:stop].clone().view(dtype).view(shape)
            start = stop
        for key in description["lists"]:
            state[key] = state[key].tolist()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"load_state_dict: the state of {name} is damaged ({error}); use another checkpoint"
        ) from None
    return description, state


# -- the form of earlier versions: bytes of each process under a key of its own ------------------


def expected_bytes(holder: Holder, device: torch.device) -> dict[str, Any]:
    """What a new optimizer offers a checkpoint of an earlier version to load into."""
    return {_process(holder): b"", FORM: torch.ones(1, dtype=torch.float32, device=device)}


def is_bytes(entry: Mapping[str, Any]) -> bool:
    """Whether the entry of a parameter was written by an earlier version."""
    return any(isinstance(value, bytes) for value in entry.values())


def unpack_bytes(entry: Mapping[str, Any], holder: Holder) -> tuple[Holder, int, dict[str, State]]:
    """Holder, calls and states in an entry of an earlier version, without executing code.

    Raises:
        ConfigError: the entry has no state of `holder`.
    """
    packed = {key: value for key, value in entry.items() if isinstance(value, bytes)}
    key = _process(holder) if len(packed) > 1 else next(iter(packed))
    if key not in packed:
        raise ConfigError(
            f"load_state_dict: no state of {key} was saved, but of {', '.join(packed)}; "
            f"{SAME_NUMBER}"
        )
    unpacked = torch.load(io.BytesIO(packed[key]), map_location="cpu", weights_only=True)
    return tuple(unpacked["process"]), unpacked["calls"], unpacked["units"]
