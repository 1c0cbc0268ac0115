"""A quiet start: sensible settings where the user made none, and no chatter he cannot act on."""

from __future__ import annotations

import logging
import os
import warnings


def prepare_environment(*, world_of_one: bool = True) -> None:
    """Fills in what the environment leaves open; call it before DeepSpeed is imported.

    A variable that the user has set is never changed. Without a launcher the process becomes a
    world of one, so that ``python script.py`` works like ``deepspeed --num_gpus 1 script.py``;
    where no engine needs that, `world_of_one` may be False.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Port 0 lets the operating system choose: nobody else has to find this process.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if world_of_one and "RANK" not in os.environ:
        os.environ.update(alone)

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
