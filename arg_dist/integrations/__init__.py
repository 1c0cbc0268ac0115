"""Entry points for other training libraries, and checks against their pitfalls."""

from arg_dist.engines.deepspeed_guard import refuse_unguarded
from arg_dist.integrations.beginning import check_trainings
from arg_dist.integrations.preparing import check_what_is_prepared
from arg_dist.integrations.saving import consolidate_before_saving

MEETINGS = (refuse_unguarded, consolidate_before_saving, check_trainings, check_what_is_prepared)
"""What is done with libraries that have been imported, in this order."""
