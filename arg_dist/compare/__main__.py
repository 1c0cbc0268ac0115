"""``python -m arg_dist.compare``; see :mod:`arg_dist.compare.line`."""

import sys

from arg_dist.compare.line import main

if __name__ == "__main__":
    sys.argv[0] = "compare"  # the name under which mistakes are told
    sys.exit(main())
