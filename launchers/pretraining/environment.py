"""Environment defaults, and log levels for a quiet start."""

from __future__ import annotations

import logging
import os
import warnings

from arg_dist.cli.parsing import InputError

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which ``mpirun`` implementations pass the number of processes."""


def prepare_environment(*, world_of_one: bool = True) -> None:
    """Sets environment defaults; call it before DeepSpeed is imported.

    Variables set by the user are kept. Without a launcher the process becomes a world of one, so
    that ``python script.py`` works like ``deepspeed --num_gpus 1 script.py``; where no engine
    needs that, `world_of_one` may be False.

    Raises:
        InputError: ``accelerate launch`` started one process although several are configured.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Port 0 lets the operating system choose: no other process has to connect.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if world_of_one and "RANK" not in os.environ:
        os.environ.update(_mpi_position() or alone)

    import torch

    if not torch.accelerator.is_available():
        # DeepSpeed would detect this itself, with a warning on every process.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # By default each process would use every core.
            neighbours = int(
                os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1
            )
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))


def _mpi_position() -> dict[str, str] | None:
    """This process's position in an ``mpirun``, as torch's variables; None without mpirun."""
    if any(int(os.environ.get(name, 1)) > 1 for name in MPI_SIZES):
        from accelerate.utils.environment import get_cpu_distributed_information

        found = get_cpu_distributed_information()
        return {
            "RANK": str(found.rank),
            "LOCAL_RANK": str(found.local_rank),
            "WORLD_SIZE": str(found.world_size),
            "LOCAL_SIZE": str(found.local_world_size),
        }
    # accelerate sets MASTER_ADDR only for jobs of several processes
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
        raise InputError(
            "distributed_type: got MULTI_CPU, for which accelerate launch needs mpirun "
            "(mpirun_config); without it, it starts a single process; use "
            "launchers/accelerate/cpu.yaml, which needs no mpirun"
        )
    return None


def quiet_libraries() -> None:
    """Silences the startup logging of DeepSpeed and transformers; warnings still appear."""
    import deepspeed
    import transformers

    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # Takes a minute to compile at the first start, and only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Raised by calls inside DeepSpeed, which users cannot change.
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
    )
    # DeepSpeed's wrappers step in place of the client optimizer, so torch believes that the
    # scheduler steps first.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
