"""``python -m launchers.cluster``; see :mod:`launchers.cluster.line`."""

import os
import sys

from launchers.cluster.line import main

if __name__ == "__main__":
    sys.argv[0] = "cluster"  # the name under which mistakes are told
    try:
        code = main()
    except SystemExit as end:  # of a signal, or a wrong option
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that still waits for an answer would abort the process
