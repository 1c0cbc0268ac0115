"""Cost of a network: pre-train on several hosts with links of different bandwidths.

    sudo .venv/bin/python -m benchmarks.network --out runs/network

The hosts are network namespaces on this machine (requires Linux, root and iproute2) that train
through launchers.cluster, alternating between the methods. Hosts share the cores, so the
compute part of a step's time is not that of real hosts; bytes and their transfer time are.

Writes network.json (every run, with command, versions, hardware and date), network.md (the table)
and network.png to --out. Unlisted options are passed to launchers/train_lm.py, for instance
--set energy=0.9.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import sys
import time
from pathlib import Path

from arg_dist.cli.parsing import BAD_INPUT, InputError, OneLineParser, at_least, complain
from arg_dist.config import ConfigError
from benchmarks.network.bandwidth import bandwidth, name_of
from benchmarks.network.methods import METHODS
from benchmarks.network.results import (
    JSON,
    PICTURE,
    TABLE,
    combine,
    draw,
    markdown,
    print_table,
)
from benchmarks.network.trial import Trial, run_trial
from launchers.pretraining.environment import prepare_environment
from launchers.pretraining.interrupts import exit_code
from launchers.reporting.files import write_json
from launchers.reporting.summary import hardware, versions
from tests.hosts.namespaces import NetworkError, obstacle

CHECKOUT = Path(__file__).resolve().parents[2]


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into options and the arguments for the job."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # else it would consume the job's options
    )
    add = parser.add_argument
    add("--bandwidths", nargs="+", type=bandwidth, metavar="BITS", help="bits per second and "
        "direction of a host's link (default: 100M 1G 10G unlimited)",
        default=[1e8, 1e9, 1e10, None])  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=["adamw", "adarankgrad"], metavar="NAME",
        help=f"what to compare, of {', '.join(METHODS)} (default: adamw adarankgrad)")  # fmt: skip
    add("--repeats", type=at_least(1), default=3, help="interleaved runs of each (default: 3)")
    add("--steps", type=at_least(2), default=30, help="measured steps per run (default: 30)")
    add("--warmup-steps", type=at_least(1), default=5, help="unmeasured steps before (default: 5)")
    add("--hosts", type=at_least(2), default=2, help="number of hosts (default: 2)")
    add("--processes-per-host", type=at_least(1), default=1, help="(default: 1)")
    add("--model", default="nano", help="as in train_lm.py (default: nano)")
    add("--batch-size", type=at_least(1), default=16, help="sequences per step (default: 16)")
    add("--seq-len", type=at_least(2), default=128, help="tokens per sequence (default: 128)")
    add("--deepspeed_config", type=Path, default=CHECKOUT / "ds_configs" / "zero2.json",
        metavar="JSON", help="DeepSpeed config of adamw and adarankgrad (default: "
        "ds_configs/zero2.json)")  # fmt: skip
    add("--limit", type=at_least(1), default=1800, metavar="SECONDS", help="time limit of one run "
        "(default: 1800)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/network"), help="output directory (default: "
        "runs/network)")  # fmt: skip
    return parser.parse_known_args()


def bench(options: argparse.Namespace, job: list[str]) -> None:
    """Run all trials, saving the results after each."""
    if (why := obstacle()) is not None:
        raise InputError(f"cannot create hosts here: {why}")
    if (options.out / JSON).exists():
        raise InputError(f"--out {options.out}: already contains results; use another directory")
    sharded = [name for name in options.methods if METHODS[name].shards_hosts]
    if sharded and options.processes_per_host < 2:
        raise InputError(
            f"--methods {sharded[0]}: a host's processes share a copy of the model, and "
            f"--processes-per-host is {options.processes_per_host}; give at least 2"
        )
    sizes = ("--batch-size", str(options.batch_size), "--seq-len", str(options.seq_len))
    config = ("--deepspeed_config", str(options.deepspeed_config.resolve()))
    trial = Trial(
        hosts=options.hosts,
        processes=options.processes_per_host,
        script=CHECKOUT / "launchers" / "train_lm.py",
        words=("--model", options.model, *sizes, *job),
        engine=config,
        warmup=options.warmup_steps,
        steps=options.steps,
        limit=float(options.limit),
    )
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.network", *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "job": {"hosts": trial.hosts, "processes_per_host": trial.processes, "words": trial.words},
    }
    places = [(b, method) for b in options.bandwidths for method in options.methods]
    runs = []
    for number in range(options.repeats):
        for bits, method in places:
            name = f"{method}-{name_of(bits).replace(' ', '').replace('/', '-')}-{number + 1}"
            began = time.monotonic()
            found = run_trial(trial, METHODS[method], bits, (options.out / name).resolve())
            runs.append({"optimizer": method, "bits_per_second": bits, **found})
            write_json(options.out / JSON, {**facts, "rows": combine(runs), "runs": runs})
            print(
                f"{len(runs)} of {options.repeats * len(places)}: {name}: "
                f"{found['seconds']:.3f} s/step, {100 * found['waiting']:.0f} % waiting "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    rows = combine(runs)
    (options.out / TABLE).write_text(markdown(rows))
    draw(rows, options.out / PICTURE)
    print_table(rows)
    print(f"bytes are per host and step; wrote {options.out / JSON}, {options.out / PICTURE}")


def main() -> int:
    """Run the benchmark and report errors in one line."""
    options, job = parse_options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(exit_code(number)))
    try:
        prepare_environment(world_of_one=False)
        bench(options, job)
        return 0
    except (InputError, ConfigError, NetworkError) as error:
        complain(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        return exit_code(signal.SIGINT)


if __name__ == "__main__":
    sys.argv[0] = "network"  # the prefix of error messages
    sys.exit(main())
