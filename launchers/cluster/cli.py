"""``python -m launchers.cluster [OPTIONS] SCRIPT [ARGS...]``: node k of n of a job, without ssh.

Run the same command on every node; MASTER_ADDR is the address of node 0. The environment provides
the defaults of all options; Slurm's and Kubernetes' own variables provide the number of nodes and
the index of this one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import torch

from arg_dist.cli.parsing import BAD_INPUT, FAILED, InputError, OneLineParser, complain
from launchers.cluster import ClusterError, commands
from launchers.cluster.child import SIGNALS, Child, adopt_orphans
from launchers.cluster.description import describe
from launchers.cluster.meeting import meet
from launchers.cluster.network import (
    INTERFACE_VARIABLES,
    find_own_address,
    interface_of,
    own_address,
    reason,
)
from launchers.cluster.place import DEFAULT_PORT, LOCAL, Place, find_place, whole_number
from launchers.cluster.presence import QUIET_SECONDS
from launchers.cluster.store import Notes, connect, open_store
from launchers.cluster.watch import Watch

START_TIMEOUT = 600
Tell = Callable[[str], None]
POLL_SECONDS = 0.1


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those of the process if None.

    Returns:
        The launcher's exit code; 2 if an input is invalid or the nodes differ, 1 if a node did not
        join or is lost.
    """
    options = _parser().parse_args(arguments)
    for number in SIGNALS:
        signal.signal(number, _end_at_once)
    place: Place | None = None
    try:
        place = find_place(
            os.environ,
            nodes=options.nodes,
            node_rank=options.node_rank,
            master_addr=options.master_addr,
            master_port=options.master_port,
        )
        return _run(place, _read_job(options, os.environ), dry=options.dry_run)
    except (InputError, ClusterError) as error:
        node = "" if place is None else f"node {place.node}: "
        complain(f"{node}{error}")
        return error.code if isinstance(error, ClusterError) else BAD_INPUT


def _run(place: Place, job: commands.Job, *, dry: bool) -> int:
    def tell(line: str) -> None:
        print(f"cluster: node {place.node}: {line}", flush=True)

    address = LOCAL  # a single node has no traffic to other machines
    if place.nodes > 1 and dry:
        address = _address_now(place)
    elif place.nodes > 1:
        address = find_own_address(place.address, place.port, job.start_timeout, tell)
    with tempfile.TemporaryDirectory(prefix="arg-dist-cluster-") as folder:
        command = commands.build(job, place, address, Path(folder))
        environment = _environment(command, address, place, tell)
        tell(f"{place}; this node's own address: {address}")
        for name, value in command.variables.items():
            tell(f"{name}={value}")
        tell(shlex.join(command.words))
        if dry:
            return 0
        adopt_orphans()
        if place.nodes == 1:
            return _supervise(Child(command.words, environment, through=_through(job)), None)
        notes = _open(place, job, tell)
        description = describe(
            nodes=place.nodes,
            processes=job.processes,
            launcher=job.launcher,
            max_restarts=job.max_restarts,
            command=job.script,
            accelerate_config=job.accelerate_config,
        )
        presence = meet(notes, place, address, description, seconds=job.start_timeout, tell=tell)
        tell(f"all {place.nodes} nodes have joined, and run the same")
        watch = Watch(
            presence,
            place,
            max_restarts=job.max_restarts,
            seconds=job.start_timeout,
            tell=tell,
        )
        child = Child(command.words, environment, through=_through(job))
        code = _supervise(child, watch)
        if code:
            if not child.signals:
                time.sleep(QUIET_SECONDS)  # a lost node counts as quiet after that
            for line in watch.missing(QUIET_SECONDS):
                tell(line)
            complain(f"node {place.node}: the launcher exited with code {code}")
        presence.end(code)
        if place.node == 0:
            _stay(child, watch, job.start_timeout, tell)
        presence.leave()
        return code


def _address_now(place: Place) -> str:
    try:
        return own_address(place.address, place.port)
    except OSError as error:
        return f"<unknown: {reason(error)}>"


def _open(place: Place, job: commands.Job, tell: Tell) -> Notes:
    """The store: node 0 opens it, and connects to it like the other nodes."""
    if place.node > 0:
        return connect(place, job.start_timeout, tell)
    own = open_store(place, tell)
    connect(place, job.start_timeout, tell).check_same(own, place)
    return own


def _supervise(child: Child, watch: Watch | None) -> int:
    """The launcher's exit code; 1 if it was terminated because of another node."""
    child.forward_signals()
    while (code := child.exit_code()) is None:
        if watch is not None and (why := watch.reason_to_end()) is not None:
            complain(f"{why}; terminating this node's processes")
            child.terminate()
            return FAILED
        time.sleep(POLL_SECONDS)
    if left := child.sweep():
        complain(f"the launcher left {left} processes behind; they were terminated")
    return code


def _stay(child: Child, watch: Watch, seconds: float, tell: Tell) -> None:
    """Keeps the store open until the other nodes have finished, or a signal arrives."""
    signals, began, reported = child.signals, time.monotonic(), False
    while watch.others_run() and child.signals == signals:
        waited = time.monotonic() - began
        if waited > seconds:
            break
        if waited > QUIET_SECONDS and not reported:
            tell("the launcher has exited; waiting for the other nodes to finish")
            reported = True
        time.sleep(POLL_SECONDS)


def _environment(
    command: commands.Command, address: str, place: Place, tell: Tell
) -> dict[str, str]:
    environment = {**os.environ, **command.variables}
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # launchers set their own
        environment.pop(name, None)
    if place.nodes == 1:
        return environment
    interface = interface_of(address)
    for name in INTERFACE_VARIABLES:
        if environment.get(name):
            tell(f"{name}={environment[name]}, as set in the environment")
        elif interface is not None:
            environment[name] = interface
            tell(f"{name}={interface}")
    if interface is None:
        tell(f"no interface has the address {address}: gloo and NCCL choose one themselves")
    return environment


def _read_job(options: argparse.Namespace, environment: Mapping[str, str]) -> commands.Job:
    launcher = options.launcher or environment.get("ARG_DIST_LAUNCHER") or "torchrun"
    if launcher not in commands.LAUNCHERS:
        raise InputError(
            f"ARG_DIST_LAUNCHER={launcher}: must be one of {', '.join(commands.LAUNCHERS)}"
        )
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    processes = whole_number(
        "--processes-per-node",
        options.processes_per_node,
        "NPROC_PER_NODE",
        environment,
        least=1,
        default=max(1, gpus),
    )
    restarts = whole_number(
        "--max-restarts", options.max_restarts, "MAX_RESTARTS", environment, least=0, default=0
    )
    if restarts and launcher == "deepspeed":
        raise InputError(
            f"--max-restarts (MAX_RESTARTS) {restarts}: the deepspeed launcher does not restart "
            "processes; use torchrun, which runs jobs with --deepspeed_config as well"
        )
    seconds = whole_number(
        "--start-timeout",
        options.start_timeout,
        "START_TIMEOUT",
        environment,
        least=1,
        default=START_TIMEOUT,
    )
    config = options.accelerate_config or environment.get("ACCELERATE_CONFIG") or None
    if launcher == "accelerate":
        if config is None:
            raise InputError(
                "ACCELERATE_CONFIG: not set; accelerate needs a configuration file, for instance "
                "launchers/accelerate/multinode_fsdp2.yaml; set it here or with --accelerate-config"
            )
        if not Path(config).is_file():
            raise InputError(f"ACCELERATE_CONFIG={config}: no such file")
    elif config is not None:
        print(f"cluster: ACCELERATE_CONFIG={config} has no effect with {launcher}", flush=True)
        config = None
    if not Path(options.script).is_file():
        raise InputError(f"SCRIPT {options.script}: no such file in {Path.cwd()}")
    return commands.Job(
        launcher, processes, restarts, float(seconds), config, (options.script, *options.arguments)
    )


def _through(job: commands.Job) -> bool:
    return job.launcher == "deepspeed"


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m launchers.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--launcher",
        choices=commands.LAUNCHERS,
        help="launcher of this node's processes (ARG_DIST_LAUNCHER; default: torchrun)",
    )
    parser.add_argument(
        "--nodes", metavar="N", help="number of nodes (NNODES, SLURM_JOB_NUM_NODES; default: 1)"
    )
    parser.add_argument(
        "--node-rank",
        metavar="K",
        help="index of this node, from 0 (NODE_RANK, SLURM_NODEID, JOB_COMPLETION_INDEX)",
    )
    parser.add_argument(
        "--master-addr",
        metavar="HOST",
        help="address of node 0 (MASTER_ADDR; with Slurm the first of SLURM_JOB_NODELIST)",
    )
    parser.add_argument(
        "--master-port",
        metavar="PORT",
        help=f"port of node 0 that the others can reach (MASTER_PORT; default: {DEFAULT_PORT})",
    )
    parser.add_argument(
        "--processes-per-node",
        metavar="N",
        help="number of processes on each node (NPROC_PER_NODE; default: the number of GPUs, "
        "1 without)",
    )
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        help="how often torchrun or accelerate restarts the processes after a fault "
        "(MAX_RESTARTS; default: 0)",
    )
    parser.add_argument(
        "--start-timeout",
        metavar="SECONDS",
        help="how long to wait for late nodes, at the start and after a fault "
        f"(START_TIMEOUT; default: {START_TIMEOUT})",
    )
    parser.add_argument(
        "--accelerate-config",
        metavar="FILE",
        help="configuration file of accelerate launch (ACCELERATE_CONFIG)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")
    parser.add_argument("script", metavar="SCRIPT", help="the job")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    return parser
