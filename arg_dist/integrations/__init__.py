"""Entry points for other training libraries, and checks against their pitfalls.

Importing this package registers what is wrapped in these libraries once they are in use.
"""

from arg_dist.integrations import beginning, preparing, saving  # noqa: F401  register themselves
