"""AdaRankGrad for models sharded across processes: DeepSpeed ZeRO, FSDP2, DDP."""

from arg_dist import checkpoint
from arg_dist import engines as _engines  # noqa: F401  registers the adapters
from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.engines.deepspeed_entry import initialize
from arg_dist.groups import classify, param_groups
from arg_dist.integrations.accelerate import prepare
from arg_dist.integrations.trainer import for_trainer
from arg_dist.optimizer import AdaRankGrad
from arg_dist.sharding.waiting import NoAnswerError

__version__ = "0.1.0"

__all__ = [
    "AdaRankGrad",
    "AdaRankGradConfig",
    "ConfigError",
    "NoAnswerError",
    "checkpoint",
    "classify",
    "for_trainer",
    "initialize",
    "param_groups",
    "prepare",
]
