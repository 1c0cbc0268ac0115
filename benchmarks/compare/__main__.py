"""``python -m benchmarks.compare``; see :mod:`benchmarks.compare.line`."""

import sys

from benchmarks.compare.line import main

if __name__ == "__main__":
    sys.argv[0] = "compare"  # the prefix of error messages
    sys.exit(main())
