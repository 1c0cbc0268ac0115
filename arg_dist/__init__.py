"""AdaRankGrad for models sharded across processes: DeepSpeed ZeRO, FSDP2, DDP."""

from arg_dist import checkpoint
from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.engines import ADAPTERS as _ADAPTERS
from arg_dist.engines.deepspeed_entry import initialize
from arg_dist.engines.deepspeed_entry import offer_by_name as _offer_by_name
from arg_dist.engines.patching import use_meetings as _use_meetings
from arg_dist.engines.replicated import sketch_only
from arg_dist.integrations import MEETINGS as _MEETINGS
from arg_dist.integrations.accelerate import prepare
from arg_dist.integrations.trainer import for_trainer
from arg_dist.model_groups import classify, param_groups
from arg_dist.optimizer import AdaRankGrad
from arg_dist.sharding.fragment import use_adapters as _use_adapters
from arg_dist.sharding.timeouts import NoAnswerError

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
    "sketch_only",
]

# imports run one way, so what lower layers call of higher ones is handed down to them here
_use_adapters(_ADAPTERS)
_use_meetings(_MEETINGS)
_offer_by_name()
