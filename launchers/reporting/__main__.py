"""``python -m launchers.reporting compare RUN_DIR [RUN_DIR ...]`` compares training runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launchers.reporting.charts import draw_comparison
from launchers.reporting.files import read_metrics, read_report
from launchers.reporting.tables import print_comparison


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launchers.reporting", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="print a table of runs and draw compare.png")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    compare.add_argument("--out", type=Path, default=Path("compare.png"), help="path of the chart")
    options = parser.parse_args(arguments)
    runs = {}
    for directory in options.runs:
        try:
            runs[_label(directory, options.runs)] = read_report(directory), read_metrics(directory)
        except (OSError, ValueError) as error:
            print(f"{directory}: not the directory of a finished run: {error}", file=sys.stderr)
            return 2
    print_comparison({name: report for name, (report, _) in runs.items()})
    draw_comparison(runs, options.out)
    print(f"written: {options.out}")
    return 0


def _label(directory: Path, all_runs: list[Path]) -> str:
    """The directory's name, or its path if several runs share the name."""
    name = directory.resolve().name
    sharing = [other for other in all_runs if other.resolve().name == name]
    return name if len(sharing) == 1 else str(directory)


if __name__ == "__main__":
    sys.exit(main())
