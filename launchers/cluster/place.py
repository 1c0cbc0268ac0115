"""This node's index, the number of nodes and node 0's address, from options and the environment.

A value comes from the option, else from its variable, else from the variables of Slurm or
Kubernetes. It is an error if those contradict the option or variable: one of them is unintended.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from arg_dist.cli.parsing import InputError
from launchers.cluster import slurm

DEFAULT_PORT = 29400
LOCAL = "127.0.0.1"
NODES = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES")
NODE_RANK = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Variables of Slurm and Kubernetes; of :data:`NODES` the first one that is set counts."""


@dataclass(frozen=True)
class Place:
    """Node `node` of `nodes`; node 0 is found at `address` and `port`."""

    node: int
    nodes: int
    address: str
    port: int

    @property
    def endpoint(self) -> str:
        """`address:port`, an IPv6 address in brackets."""
        return endpoint(self.address, self.port)

    def __str__(self) -> str:
        if self.nodes == 1:
            return "the only node"
        return f"number {self.node} of {self.nodes} nodes, node 0 is at {self.endpoint}"


@dataclass(frozen=True)
class Given:
    """A value, and the option or variable that it comes from."""

    value: str
    source: str

    def __str__(self) -> str:
        return f"{self.source}={self.value}"


def endpoint(address: str, port: int) -> str:
    """`address:port`, an IPv6 address in brackets."""
    try:
        brackets = ipaddress.ip_address(address).version == 6
    except ValueError:  # a name
        brackets = False
    return f"[{address}]:{port}" if brackets else f"{address}:{port}"


def find_place(
    environment: Mapping[str, str],
    *,
    nodes: str | None = None,
    node_rank: str | None = None,
    master_addr: str | None = None,
    master_port: str | None = None,
) -> Place:
    """The place of this node.

    Args:
        environment: of the process.
        nodes: option ``--nodes`` as passed, None if it was not; likewise the other options.
        node_rank: option ``--node-rank``.
        master_addr: option ``--master-addr``.
        master_port: option ``--master-port``.

    Raises:
        InputError: a value is missing, cannot be used, or contradicts another one.
    """
    _one_task_a_node(environment)
    count = _agreed(
        _given("--nodes", nodes, "NNODES", environment), _first_set(NODES, environment)[:1]
    )
    total = 1 if count is None else _whole_number(count, least=1)
    index = _agreed(
        _given("--node-rank", node_rank, "NODE_RANK", environment),
        _first_set(NODE_RANK, environment),
    )
    if index is None and total > 1:
        raise InputError(
            f"NODE_RANK: not set, but {count}; give each node its index, 0 to {total - 1}, with "
            "NODE_RANK or --node-rank (Slurm's SLURM_NODEID and Kubernetes' JOB_COMPLETION_INDEX "
            "also work)"
        )
    node = 0 if index is None else _whole_number(index, least=0)
    if node >= total:
        assert index is not None
        needed = "0" if total == 1 else f"0 to {total - 1}"
        of = "NNODES (not set, so 1)" if count is None else str(count)
        raise InputError(f"{index}: the index of this node is needed, {needed} with {of}")
    address = _address(environment, master_addr, total)
    given_port = _given("--master-port", master_port, "MASTER_PORT", environment)
    port = DEFAULT_PORT if given_port is None else _whole_number(given_port, least=1)
    if port > 65534:
        raise InputError(
            f"{given_port}: a port up to 65534 is needed; the next one may be used too"
        )
    return Place(node, total, address, port)


def whole_number(
    option: str,
    given: str | None,
    variable: str,
    environment: Mapping[str, str],
    *,
    least: int,
    default: int,
) -> int:
    """The whole number that an option or its variable specifies.

    Raises:
        InputError: it is not a whole number, or less than `least`.
    """
    found = _given(option, given, variable, environment)
    return default if found is None else _whole_number(found, least=least)


def _address(environment: Mapping[str, str], option: str | None, nodes: int) -> str:
    given = _given("--master-addr", option, "MASTER_ADDR", environment)
    if given is not None:
        if given.value.count(":") == 1 or "/" in given.value:
            raise InputError(
                f"{given}: a host name or an address is needed; set the port with MASTER_PORT"
            )
        return given.value.strip("[]")
    if nodes == 1:
        return LOCAL
    first = slurm.first_host(environment)
    if first is None:
        raise InputError(
            f"MASTER_ADDR: not set, but there are {nodes} nodes; on all of them, set MASTER_ADDR "
            "or --master-addr to the address or name of node 0"
        )
    return first


def _one_task_a_node(environment: Mapping[str, str]) -> None:
    local = environment.get("SLURM_LOCALID", "0")
    if local != "0":
        raise InputError(
            f"SLURM_LOCALID={local}: srun started more than one task on this node; exactly one is "
            "needed, which starts the node's processes: srun --ntasks-per-node=1"
        )


def _given(
    option: str, value: str | None, variable: str, environment: Mapping[str, str]
) -> Given | None:
    if value is not None:
        return Given(value, option)
    # an empty variable counts as unset: compose files and pods pass unset values that way
    return Given(environment[variable], variable) if environment.get(variable) else None


def _first_set(variables: tuple[str, ...], environment: Mapping[str, str]) -> list[Given]:
    return [Given(environment[name], name) for name in variables if environment.get(name)]


def _agreed(given: Given | None, told: list[Given]) -> Given | None:
    """The value on which all sources agree."""
    all_of_them = [*([] if given is None else [given]), *told]
    for other in all_of_them[1:]:
        if other.value != all_of_them[0].value:
            raise InputError(
                f"{all_of_them[0]} and {other} contradict each other; unset {other.source}, "
                f"or omit {all_of_them[0].source}"
            )
    return all_of_them[0] if all_of_them else None


def _whole_number(given: Given, *, least: int) -> int:
    text = given.value.strip()
    if not (text.isdecimal() and text.isascii() and int(text) >= least):
        raise InputError(f"{given}: a whole number of at least {least} is needed")
    return int(text)
