"""Runs the main job with a report that takes SECONDS more: ``slow_report.py SECONDS OPTION...``"""

import runpy
import sys
import time
from typing import Any

from arg_dist.cli.parsing import is_first_process
from launchers.reporting import RunRecord


def main() -> None:
    seconds, finish = float(sys.argv.pop(1)), RunRecord.finish

    def slowly(*arguments: Any) -> None:
        if is_first_process():
            time.sleep(seconds)
        finish(*arguments)

    RunRecord.finish = slowly
    runpy.run_path("launchers/train_lm.py", run_name="__main__")


if __name__ == "__main__":
    main()
