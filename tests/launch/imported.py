"""What the launches' scripts import, imported once: forked processes begin with all of it.

Nothing here may start a thread, or touch a device: neither outlives a fork.
"""

from __future__ import annotations

import contextlib
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import datasets  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import tensorboardX  # noqa: F401
import torch
import torch.distributed.fsdp
from deepspeed.checkpoint import ds_to_universal  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
)

with contextlib.suppress(ImportError):  # older versions have none
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
with contextlib.suppress(ImportError):
    from trl import SFTTrainer  # noqa: F401

from launchers import finetune, train_lm  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # or every collection of a forked process would go through all of this
