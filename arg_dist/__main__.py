"""``python -m arg_dist`` is ``arg-dist``."""

import sys

from arg_dist.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "arg-dist"  # under which name mistakes are told
    sys.exit(main())
