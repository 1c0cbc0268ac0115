"""Writes the generated regions of docs/planning-memory.md: a plan, and which engines fit on a GPU.

python docs/generate_plans.py            rewrites the regions
python docs/generate_plans.py --check    exits 1 if they are stale
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from rich.console import Console

from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.choices import ENGINES
from arg_dist.planning.figures import make_plan
from arg_dist.planning.model import Model, load_model
from arg_dist.planning.table import print_plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("planning-memory.md")
SETTINGS = AdaRankGradConfig()
BUCKET: int = json.loads((ROOT / "ds_configs/zero3_bf16.json").read_text())["zero_optimization"][
    "reduce_bucket_size"
]

MODELS = ("1b", "7b", "13b", "70b")
CASES = (("ddp", "fp32"), ("zero2", "bf16"), ("zero3", "bf16"), ("fsdp2", "fp32"))
GIGABYTES = (24, 40, 48, 80, 141)
SHARE = 0.75
"""Of a GPU's memory that the plan may take; the rest is for what it leaves out."""
PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OPTIMIZERS = ("AdaRankGrad", "AdamW")


@cache
def model(name: str) -> Model:
    """The parameters of a size by name."""
    return load_model(name, SETTINGS)


def peaks(name: str, engine: str, dtype: str) -> dict[str, list[int]]:
    """Peak of the fullest process for each number of processes, by optimizer.

    Stops where both fit on the smallest GPU, or where more processes hardly help.
    """
    found: dict[str, list[int]] = {optimizer: [] for optimizer in OPTIMIZERS}
    smallest = SHARE * 1e9 * min(GIGABYTES)
    for processes in PROCESSES:
        plan = make_plan(
            model(name), SETTINGS, engine=engine, processes=processes, dtype=dtype,
            reduce_bucket=BUCKET,
        )  # fmt: skip
        for optimizer, peak in found.items():
            peak.append(int(plan.figures[optimizer].peak.max()))
        shrinks = any(len(p) < 2 or p[-1] < 0.97 * p[-2] for p in found.values())
        if max(peak[-1] for peak in found.values()) <= smallest or not shrinks:
            break
    return found


def example() -> str:
    """What ``arg-dist plan`` prints for the page's command."""
    plan = make_plan(model("7b"), SETTINGS, engine="zero3", processes=8, dtype="bf16")
    output = io.StringIO()
    print_plan(plan, Console(file=output, width=100, color_system=None))
    table = output.getvalue().partition("╯")[0] + "╯"
    return "```text\n" + "\n".join(line.rstrip() for line in table.splitlines()) + "\n```"


def table() -> str:
    """Fewest processes with which a model fits on a GPU, for AdaRankGrad and AdamW."""
    rows = [
        ["model", "engine", "weights", *(f"{size} GB" for size in GIGABYTES)],
        ["---"] * 3 + ["---:"] * len(GIGABYTES),
    ]
    for name in MODELS:
        for engine, dtype in CASES:
            found = peaks(name, engine, dtype)
            cells = [
                " / ".join(_fewest(found[optimizer], size) for optimizer in OPTIMIZERS)
                for size in GIGABYTES
            ]
            rows.append([name, ENGINES[engine], dtype, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _fewest(peaks: list[int], gigabytes: int) -> str:
    fitting = (
        n for n, peak in zip(PROCESSES, peaks, strict=False) if peak <= SHARE * 1e9 * gigabytes
    )
    return str(next(fitting, "-"))


def main() -> int:
    """Writes the regions, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a region is stale")
    check = parser.parse_args().check
    before = after = PAGE.read_text()
    for name, text in (("example", example()), ("table", table())):
        region = re.compile(f"(<!-- {name}: generated .*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        after, count = region.subn(lambda found, t=text: f"{found[1]}\n{t}\n\n{found[2]}", after)
        if count != 1:
            raise SystemExit(f"{PAGE.name}: {count} regions '{name}'; one is needed")
    if check and after != before:
        print(f"{PAGE.name} is stale: run python docs/generate_plans.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
