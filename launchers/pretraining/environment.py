"""A quiet start: sensible settings where the user made none, and no chatter he cannot act on."""

from __future__ import annotations

import logging
import os
import warnings

from arg_dist.cli.parsing import InputError

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which an ``mpirun`` tells how many processes it has started."""


def prepare_environment(*, world_of_one: bool = True) -> None:
    """Fills in what the environment leaves open; call it before DeepSpeed is imported.

    A variable that the user has set is never changed. Without a launcher the process becomes a
    world of one, so that ``python script.py`` works like ``deepspeed --num_gpus 1 script.py``;
    where no engine needs that, `world_of_one` may be False.

    Raises:
        InputError: ``accelerate launch`` has started one process where several were meant.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Port 0 lets the operating system choose: nobody else has to find this process.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if world_of_one and "RANK" not in os.environ:
        os.environ.update(_mpi_position() or alone)

    import torch

    if not torch.accelerator.is_available():
        # DeepSpeed would find the same by itself, with a warning on every process.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Each process would take every core, and they would fight for them.
            neighbours = int(
                os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1
            )
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))


def _mpi_position() -> dict[str, str] | None:
    """Which of how many processes of an ``mpirun`` this is; None if it was not started by one."""
    if any(int(os.environ.get(name, 1)) > 1 for name in MPI_SIZES):
        from accelerate.utils.environment import get_cpu_distributed_information

        found = get_cpu_distributed_information()
        return {
            "RANK": str(found.rank),
            "LOCAL_RANK": str(found.local_rank),
            "WORLD_SIZE": str(found.world_size),
            "LOCAL_SIZE": str(found.local_world_size),
        }
    # accelerate says where the first process is to be found to none but processes that look for it
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
        raise InputError(
            "distributed_type: got MULTI_CPU, for which accelerate launch needs mpirun "
            "(mpirun_config), and without it starts a single process; use "
            "launchers/accelerate/cpu.yaml, which needs none"
        )
    return None


def quiet_libraries() -> None:
    """Silences what DeepSpeed and transformers say at the start; warnings still appear."""
    import deepspeed
    import transformers

    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # Compiled at the first start for a minute, used by inference alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Functions that DeepSpeed calls, and will call by their new names when torch drops these.
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
    )
    # DeepSpeed's optimizer wrappers step in place of the client's, which torch mistakes for
    # a schedule that runs ahead of its optimizer.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
