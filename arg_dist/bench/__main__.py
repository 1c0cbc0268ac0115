"""``python -m arg_dist.bench``; see :mod:`arg_dist.bench.line`."""

import signal
import sys

from arg_dist.bench.line import main, stop_on_signals
from arg_dist.lm.interrupts import exit_code

if __name__ == "__main__":
    sys.argv[0] = "bench"  # the name under which mistakes are told
    stop_on_signals()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(exit_code(signal.SIGINT))
