"""``python -m launchers.cluster [OPTIONS] SCRIPT [ARGS...]``: node k of n of a job, without ssh.

The same command on every node, of which node 0 is found at MASTER_ADDR. Each option has its default
from the environment; Slurm's and Kubernetes' own variables tell the number of nodes and which of
them this one is.
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
        The launcher's exit code; 2 if something given is wrong or the nodes differ, 1 if a node did
        not come or is lost.
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

    address = LOCAL  # in a job of one node nothing leaves the machine
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
        tell(f"all {place.nodes} nodes are there, and run the same")
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
                time.sleep(QUIET_SECONDS)  # by then a node that was lost is quiet
            for line in watch.missing(QUIET_SECONDS):
                tell(line)
            complain(f"node {place.node}: the launcher ended with exit code {code}")
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
    """The store: node 0 opens it, and finds it as the others will."""
    if place.node > 0:
        return connect(place, job.start_timeout, tell)
    own = open_store(place, tell)
    connect(place, job.start_timeout, tell).check_same(own, place)
    return own


def _supervise(child: Child, watch: Watch | None) -> int:
    """The launcher's exit code; 1 if it was ended because of another node."""
    child.forward_signals()
    while (code := child.exit_code()) is None:
        if watch is not None and (why := watch.reason_to_end()) is not None:
            complain(f"{why}; ending this node's processes")
            child.terminate()
            return FAILED
        time.sleep(POLL_SECONDS)
    if left := child.sweep():
        complain(f"the launcher has left {left} processes behind; they are ended")
    return code


def _stay(child: Child, watch: Watch, seconds: float, tell: Tell) -> None:
    """Keeps the store open while others still end, but for a signal."""
    signals, began, told = child.signals, time.monotonic(), False
    while watch.others_run() and child.signals == signals:
        waited = time.monotonic() - began
        if waited > seconds:
            break
        if waited > QUIET_SECONDS and not told:
            tell("the launcher has ended; waiting for the other nodes to end")
            told = True
        time.sleep(POLL_SECONDS)


def _environment(
    command: commands.Command, address: str, place: Place, tell: Tell
) -> dict[str, str]:
    environment = {**os.environ, **command.variables}
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # launchers make their own of what they are told
        environment.pop(name, None)
    if place.nodes == 1:
        return environment
    interface = interface_of(address)
    for name in INTERFACE_VARIABLES:
        if environment.get(name):
            tell(f"{name}={environment[name]}, as it was set")
        elif interface is not None:
            environment[name] = interface
            tell(f"{name}={interface}")
    if interface is None:
        tell(f"no interface has the address {address}: gloo and NCCL choose one themselves")
    return environment


def _read_job(options: argparse.Namespace, environment: Mapping[str, str]) -> commands.Job:
    launcher = options.launcher or environment.get("ARG_DIST_LAUNCHER") or "torchrun"
    if launcher not in commands.LAUNCHERS:
        raise InputError(f"ARG_DIST_LAUNCHER={launcher}: one of {', '.join(commands.LAUNCHERS)}")
    gpus = torch.accelerator.device_count()
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
            f"--max-restarts (MAX_RESTARTS) {restarts}: the deepspeed launcher starts no process "
            "again; take torchrun, which runs --deepspeed_config as well"
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
                "ACCELERATE_CONFIG: not set; accelerate needs a file, which --accelerate-config "
                "names too, for instance launchers/accelerate/multinode_fsdp2.yaml"
            )
        if not Path(config).is_file():
            raise InputError(f"ACCELERATE_CONFIG={config}: there is no such file")
    elif config is not None:
        print(f"cluster: ACCELERATE_CONFIG={config} has no effect with {launcher}", flush=True)
        config = None
    if not Path(options.script).is_file():
        raise InputError(f"SCRIPT {options.script}: there is no such file in {Path.cwd()}")
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
        help="what starts this node's processes (ARG_DIST_LAUNCHER; default: torchrun)",
    )
    parser.add_argument(
        "--nodes", metavar="N", help="how many there are (NNODES, SLURM_JOB_NUM_NODES; default: 1)"
    )
    parser.add_argument(
        "--node-rank",
        metavar="K",
        help="which this one is, from 0 (NODE_RANK, SLURM_NODEID, JOB_COMPLETION_INDEX)",
    )
    parser.add_argument(
        "--master-addr",
        metavar="HOST",
        help="where node 0 is found (MASTER_ADDR; with Slurm the first of SLURM_JOB_NODELIST)",
    )
    parser.add_argument(
        "--master-port",
        metavar="PORT",
        help=f"a port of node 0 that the others reach (MASTER_PORT; default: {DEFAULT_PORT})",
    )
    parser.add_argument(
        "--processes-per-node",
        metavar="N",
        help="(NPROC_PER_NODE; default: the number of GPUs, 1 without)",
    )
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        help="how often processes are started again after a fault, by torchrun and accelerate "
        "(MAX_RESTARTS; default: 0)",
    )
    parser.add_argument(
        "--start-timeout",
        metavar="SECONDS",
        help="how long to wait for nodes that are late, at the start and after a fault "
        f"(START_TIMEOUT; default: {START_TIMEOUT})",
    )
    parser.add_argument(
        "--accelerate-config", metavar="FILE", help="of accelerate launch (ACCELERATE_CONFIG)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("script", metavar="SCRIPT", help="the job")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    return parser
