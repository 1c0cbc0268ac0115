"""``python -m launchers.cluster``; see :mod:`launchers.cluster.cli`."""

import os
import sys

from launchers.cluster.cli import main

if __name__ == "__main__":
    sys.argv[0] = "cluster"  # the prefix of error messages
    try:
        code = main()
    except SystemExit as end:  # raised by a signal or an invalid option
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that is still blocked in the store would abort the process
