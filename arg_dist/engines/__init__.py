"""Engine adapters, one file per engine: which fragment of which parameter a process holds.

No adapter imports its engine before it is in use.
"""

from arg_dist.engines.deepspeed import FlatPartitionAdapter, PartitionedParametersAdapter
from arg_dist.engines.fsdp2 import ShardedTensorAdapter
from arg_dist.engines.replicated import ReplicatedAdapter
from arg_dist.sharding.fragment import Adapter

ADAPTERS: tuple[Adapter, ...] = (
    ShardedTensorAdapter(),
    PartitionedParametersAdapter(),
    FlatPartitionAdapter(),
    ReplicatedAdapter(),  # takes plain tensors of any origin, so it is asked last
)
"""Of all engines; the first that recognizes a parameter group says what is held of it."""
