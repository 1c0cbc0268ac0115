"""Writes the generated regions of docs/planning-memory.md and README.md: a plan, and what fits.

python docs/generate_plans.py            rewrites the regions
python docs/generate_plans.py --check    exits 1 if they are stale
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from rich.console import Console

from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.planning.choices import AGAINST, ENGINES
from arg_dist.planning.figures import Plan, make_plan
from arg_dist.planning.model import Model, load_model
from arg_dist.planning.table import print_plan

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
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
CARDS = (24, 48, 80, 141)
"""Gigabytes of a card in the table of optimizers."""
FEW_BITS = {"state_dtype": "int8", "full_rank_state": "int8"}
SKETCH = {"gradient_sync": "sketch", "gradient_budget": "256MiB"}
WAYS: dict[str, dict[str, Any]] = {
    "AdaRankGrad": {},
    "`residual=none` or `matched`": {"residual": "matched"},
    '`preset="pretraining"`': {"preset": "pretraining"},
    "int8 state": FEW_BITS,
    "int8 state, `max_rank=256`": {**FEW_BITS, "max_rank": 256},
    "the same, gradients projected in the backward pass": {**FEW_BITS, "max_rank": 256, **SKETCH},
}
"""Settings of AdaRankGrad in the table of optimizers."""
SHOWN = ("AdamW", "AdamW, 8 bit", "Muon", "AdaRankGrad", "int8 state, `max_rank=256`")
"""Its rows in the README."""


@cache
def model(name: str) -> Model:
    """The parameters of a size by name."""
    return load_model(name, SETTINGS)


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
            peaks = [partial(_peak, name, engine, each, dtype) for each in OPTIMIZERS]
            cells = [
                " / ".join(_fewest(peak, size, PROCESSES) for peak in peaks) for size in GIGABYTES
            ]
            rows.append([name, ENGINES[engine], dtype, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def optimizers(dtype: str, shown: tuple[str, ...] = (*AGAINST.values(), *WAYS)) -> str:
    """Fewest cards on which each optimizer trains each model, under FSDP2."""
    rows = [
        ["", *(f"{name}: {' / '.join(map(str, CARDS))} GB" for name in MODELS)],
        ["---"] + ["---:"] * len(MODELS),
    ]
    for title in shown:
        alone = "gradient_budget" in WAYS.get(title, {}) or title == AGAINST["galore"]
        counts = [1] if alone else [n for n in PROCESSES if n <= 64]
        engine = "none" if alone else "fsdp2"
        peaks = [partial(_peak, name, engine, title, dtype) for name in MODELS]
        cells = [[_fewest(peak, size, counts) for size in CARDS] for peak in peaks]
        rows.append([title, *(" / ".join(each) for each in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _fewest(peak: Callable[[int], int], gigabytes: int, counts: Sequence[int]) -> str:
    """Fewest processes with which a plan fits on a GPU; "-" if with none of `counts`."""
    limit = SHARE * 1e9 * gigabytes
    first = bisect_left(counts, True, key=lambda n: peak(n) <= limit)
    return str(counts[first]) if first < len(counts) else "-"


def _peak(name: str, engine: str, title: str, dtype: str, processes: int) -> int:
    """Peak of the fullest process, with an optimizer or our settings."""
    plan = _plan(name, engine, title if title in WAYS else "AdaRankGrad", dtype, processes)
    return int(plan.figures["AdaRankGrad" if title in WAYS else title].peak.max())


@cache
def _plan(name: str, engine: str, way: str, dtype: str, processes: int) -> Plan:
    return make_plan(
        model(name), parse_config(WAYS[way]), engine=engine, processes=processes, dtype=dtype,
        reduce_bucket=BUCKET, against=() if WAYS[way] else tuple(AGAINST),
    )  # fmt: skip


def main() -> int:
    """Writes the regions, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a region is stale")
    check = parser.parse_args().check
    regions = {
        PAGE: {
            "example": example, "table": table, "fp32": partial(optimizers, "fp32"),
            "bf16": partial(optimizers, "bf16", (*SHOWN[:3], "GaLore", *SHOWN[3:])),
        },
        README: {"memory": partial(optimizers, "fp32", SHOWN)},
    }  # fmt: skip
    stale = [page.name for page, texts in regions.items() if _rewrite(page, texts, check=check)]
    if check and stale:
        print(f"stale: {', '.join(stale)}: run python docs/generate_plans.py", file=sys.stderr)
    return int(check and bool(stale))


def _rewrite(page: Path, texts: Mapping[str, Callable[[], str]], *, check: bool) -> bool:
    """Writes the regions of a page, or only looks; whether they were stale."""
    before = after = page.read_text()
    for name, text in texts.items():
        region = re.compile(f"(<!-- {name}: generated .*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        now = text()
        after, count = region.subn(lambda found, t=now: f"{found[1]}\n{t}\n\n{found[2]}", after)
        if count != 1:
            raise SystemExit(f"{page.name}: {count} regions '{name}'; one is needed")
    if not check:
        page.write_text(after)
    return after != before


if __name__ == "__main__":
    sys.exit(main())
