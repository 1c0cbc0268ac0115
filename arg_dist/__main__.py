"""``python -m arg_dist`` runs the ``arg-dist`` command."""

import sys

from arg_dist.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "arg-dist"  # the program name in usage and error messages
    sys.exit(main())
