"""``python -m arg_dist.bench``; see :mod:`arg_dist.bench.line`."""

import sys

from arg_dist.bench.line import main

if __name__ == "__main__":
    sys.argv[0] = "bench"  # the name under which mistakes are told
    sys.exit(main())
