"""Which versions of other libraries work: an environment for each row, and every engine in it.

    python -m tests.versions newest oldest     makes the environments, runs, keeps what was found
    python -m tests.versions --page            rewrites docs/versions.md from what is kept
    python -m tests.versions --page --check    exits 1 if the page is stale

An environment takes 6 GB and some minutes, of which its tests take most. ``PYTHONS`` may have
folders with other interpreters (default: those of pyenv).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "tests/data/versions.json"
PAGE = ROOT / "docs/versions.md"
LIBRARIES = ("torch", "deepspeed", "accelerate", "transformers", "trl", "safetensors", "pydantic")
"""Columns of the table."""
ENGINES = {
    "DDP": "ddp",
    "FSDP2": "fsdp2",
    "HSDP": "hsdp",
    "ZeRO-0": "llama-zero0",
    "ZeRO-1": "llama-zero1",
    "ZeRO-2": "llama-zero2",
    "ZeRO-3": "llama-zero3",
    "ZeRO-3, bf16": "zero3-bf16",
    "accelerate, DDP": "accelerate-ddp",
    "accelerate, FSDP2": "accelerate-fsdp2",
    "accelerate, ZeRO-2": "accelerate-zero2",
    "Trainer, DDP": "trainer-ddp",
    "Trainer, FSDP2": "trainer-fsdp2",
    "Trainer, ZeRO-3": "trainer-zero3",
}
"""By what the page calls them, their names in ``tests/launch/engines.py``; on two processes."""
OTHERS = (
    "test_bench* test_compare* test_cluster* test_docker* test_finetuning* test_gpu_benchmark* "
    "test_library_internals* test_multinode* test_presets* test_report* test_versions* "
    "test_packaging* test_rank_decay* test_stale* test_launches* test_kernels* test_readme* "
    "test_troubleshooting* test_layers*"
)
"""Unit tests of what is not in the wheel, or of the pinned versions alone."""
REFUSALS = (
    "is a DTensor on a mesh of CPUs",
    "There are currently no available devices found",
    "Cannot use ReduceOp.AVG with Gloo",
)
"""Errors of ours, of accelerate and of torch, that come before the first step."""
REASON = re.compile(r"^(?:\[rank\d\]: |E +)*(\w*(?:Error|Exception): .{0,210})", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """Versions that go together.

    Attributes:
        python: the interpreter.
        pins: versions of libraries, by name; all others are the newest that fit.
        why: whom it is for.
    """

    python: str
    pins: Mapping[str, str]
    why: str


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line))


ROWS = {
    "newest": Row("3.13", pinned(), "all pinned versions, on the newest Python"),
    "axolotl": Row(
        "3.12",
        {
            "torch": "2.12.1", "deepspeed": "0.18.9", "accelerate": "1.13.0",
            "transformers": "5.14.1", "trl": "1.8.0",
        },
        "what axolotl 0.15 asks for",
    ),
    "LLaMA-Factory": Row(
        "3.12",
        {
            "torch": "2.9.1", "deepspeed": "0.18.4", "accelerate": "1.11.0",
            "transformers": "5.8.0", "trl": "0.24.0", "safetensors": "0.6.2",
        },
        "what LLaMA-Factory 0.9.5 permits at most",
    ),
    "oldest": Row(
        "3.12",
        {
            "torch": "2.7.0", "deepspeed": "0.17.0", "accelerate": "1.11.0",
            "transformers": "4.47.0", "trl": "0.13.0", "safetensors": "0.6.1",
        },
        "the lower bounds of pyproject.toml",
    ),
}  # fmt: skip


@dataclass
class Outcome:
    """What was found in a row.

    Attributes:
        date: when.
        commit: of which code.
        python: version of the interpreter.
        installed: versions of :data:`LIBRARIES`.
        tests: unit and lockstep tests by how they ended.
        failed: names of those that failed.
        engines: by name, "yes" or why not.
    """

    date: str
    commit: str
    python: str
    installed: dict[str, str]
    tests: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    engines: dict[str, str] = field(default_factory=dict)


# -- an environment -------------------------------------------------------------------------------


def interpreter(version: str) -> str:
    """The path of a Python of a version.

    Raises:
        SystemExit: there is none.
    """
    pyenv = os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")
    folders = os.environ.get("PYTHONS", "").split(os.pathsep)
    folders += map(str, Path(pyenv).glob(f"versions/{version}.*/bin"))
    path = os.pathsep.join([*filter(None, folders), os.environ["PATH"]])
    found = shutil.which(f"python{version}", path=path)
    if found is None:
        sys.exit(f"versions: no python{version} found; name its folder in PYTHONS")
    return found


def environment(row: Row, folder: Path) -> dict[str, str]:
    """Makes the environment of a row in a folder; the variables with which it is used."""
    subprocess.run([interpreter(row.python), "-m", "venv", folder], check=True)
    pins = [f"{name}=={version}" for name, version in row.pins.items() if name in LIBRARIES]
    tools = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "psutil", "build", "numpy"]
    tools += [
        "tensorboardX",
        "matplotlib",
        "scikit-learn",
        "datasets",
        "setuptools>=77,<82",
        "ninja",
    ]
    if row.pins == pinned():
        tools = [f"{name.split('>')[0]}=={pinned()[name.split('>')[0]]}" for name in tools]
    pip = [folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    settled = {**os.environ, "DS_BUILD_OPS": "0"}
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    subprocess.run([*pip, torch, *tools], check=True, env=settled)
    editable = ["--no-build-isolation", "--editable", str(ROOT)]
    subprocess.run([*pip, *pins, *editable], check=True, env=settled)
    return variables_of(folder)


def variables_of(folder: Path) -> dict[str, str]:
    """The variables with which the environment in a folder is used."""
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "ARG_DIST_TEST_PATIENCE": "3",
    }


def pytest(variables: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs tests in an environment."""
    python = shutil.which("python", path=variables["PATH"])
    assert python is not None
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command, cwd=ROOT, env=dict(variables), capture_output=True, text=True, check=False
    )


# -- a row ----------------------------------------------------------------------------------------


def tried(name: str, kept: Path | None = None) -> Outcome:
    """Runs the tests in the environment of a row.

    Args:
        name: of :data:`ROWS`.
        kept: folder of an environment that was made before; None: a fresh one.
    """
    with tempfile.TemporaryDirectory(prefix="versions-") as given:
        folder = Path(given)
        variables = variables_of(kept) if kept else environment(ROWS[name], folder)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        outcome = Outcome(today, commit, *installed(variables))
        outcome.tests, outcome.failed = ran_units(variables, folder)
        print(f"{name}: {outcome.tests}", flush=True)
        outcome.engines = ran_engines(variables, folder)
        return outcome


def installed(variables: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The versions of the interpreter and of :data:`LIBRARIES`."""
    script = (
        "import json, platform, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps([platform.python_version(), {n: version(n) for n in sys.argv[1:]}]))"
    )
    python = shutil.which("python", path=variables["PATH"])
    told = subprocess.run([str(python), "-c", script, *LIBRARIES], capture_output=True, text=True)
    found, versions = json.loads(told.stdout)
    return found, versions


def ends_of(variables: Mapping[str, str], folder: Path, *words: str) -> dict[str, str]:
    """How each test ended: "passed", "skipped", or what it said last."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    printed = pytest(variables, f"--junitxml={report}", *words)
    if not report.exists():
        sys.exit(f"versions: pytest failed:\n{printed.stdout[-2000:]}{printed.stderr[-2000:]}")
    ends = {}
    for case in ElementTree.parse(report).iter("testcase"):
        end = "passed"
        for child in case:
            if child.tag == "skipped":
                end = "skipped"
            elif child.tag in ("failure", "error"):
                reasons = REASON.findall(child.text or "")
                end = reasons[-1] if reasons else (child.get("message") or "failed")[:160]
        ends[f"{case.get('classname')}::{case.get('name')}"] = end
    return ends


def ran_units(variables: Mapping[str, str], folder: Path) -> tuple[dict[str, int], list[str]]:
    """How many unit and lockstep tests ended how, and the names of those that failed."""
    ignored = [f"--ignore-glob=*/{pattern}" for pattern in OTHERS.split()]
    ends = ends_of(variables, folder, "tests/unit", "tests/lockstep", "-n", "2", *ignored)
    failed = [name for name, end in ends.items() if end not in ("passed", "skipped")]
    count = Counter(ends.values())
    counts = {"passed": count["passed"], "skipped": count["skipped"], "failed": len(failed)}
    return counts, failed


def ran_engines(variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Whether twenty steps under each engine are those of one process: "yes", or why not.

    All of a launcher run in one launch; where one of them fails, each runs by itself.
    """
    together = under_engines(variables, folder, list(ENGINES.values()))
    found = {}
    for called, engine in ENGINES.items():
        end = together[engine]
        for _ in range(2):  # old versions of gloo do not always let a process end
            if end != "yes":
                end = under_engines(variables, folder, [engine])[engine]
        found[called] = end
        print(f"{called}: {end}", flush=True)
    return found


def under_engines(
    variables: Mapping[str, str], folder: Path, engines: Sequence[str]
) -> dict[str, str]:
    """How training ended under engines that may share launches."""
    chosen = {**variables, "ARG_DIST_TEST_ENGINES": " ".join(engines)}
    names = " or ".join(f"{engine}-2" for engine in engines)
    ends = ends_of(chosen, folder, "tests/launch/test_engines.py", "-k", names)
    by_engine = {name.rsplit("[", 1)[-1].removesuffix("-2]"): end for name, end in ends.items()}
    return {e: "yes" if by_engine[e] == "passed" else by_engine[e] for e in engines}


# -- the page -------------------------------------------------------------------------------------


HEAD = """\
# Versions

Lower bounds are those of the row `oldest`; an older library is an error that names the version
needed. Each row is an environment of its own, made by `python -m tests.versions ROW`, in which the
unit and lockstep tests run, and twenty steps under each engine on two processes, whose losses must
be those of one process. CPUs only.

*refused*: an error before the first step, which says why. torch 2.7 and 2.8 add up FSDP2's
gradients over gloo, on CPUs, where they should average them, with any optimizer; NCCL averages (by
reading).
"""


def page(found: Mapping[str, Any]) -> str:
    """The page in docs/."""
    rows = {name: found[name] for name in ROWS if name in found}

    def line(first: str, cell: Callable[[str, Any], str]) -> list[str]:
        return [first, *(cell(name, row) for name, row in rows.items())]

    lines = [
        line("for", lambda name, _: ROWS[name].why),
        line("Python", lambda _, row: row["python"]),
        *(line(each, lambda _, row, e=each: row["installed"][e]) for each in LIBRARIES),
        line("unit, lockstep tests: passed", lambda _, row: str(row["tests"]["passed"])),
        line("failed", lambda _, row: str(row["tests"]["failed"])),
        *(line(each, lambda _, row, e=each: mark(row["engines"].get(e))) for each in ENGINES),
        line("date, commit", lambda _, row: f"{row['date']}, {row['commit']}"),
    ]
    notes = [
        f"- `{name}`, {engine}: `{told}`"
        for name, row in rows.items()
        for engine, told in row["engines"].items()
        if told != "yes"
    ]
    notes += [f"- `{name}`: `{each}` fails" for name, row in rows.items() for each in row["failed"]]
    faults = (
        ["What is refused, or does not work, and what it says:", "", *notes, ""] if notes else []
    )
    return "\n".join([HEAD, table(line("", lambda name, _: f"`{name}`"), lines), "", *faults])


def mark(told: str | None) -> str:
    """A cell of the table."""
    if told is None or told == "yes":
        return told or "-"
    return "refused" if any(error in told for error in REFUSALS) else "no"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Runs rows, or writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--in", type=Path, dest="kept", help="an environment that is there")
    parser.add_argument("--page", action="store_true", help="rewrite docs/versions.md")
    parser.add_argument("--check", action="store_true", help="only compare the page")
    given = parser.parse_args()
    found = {}
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(FOUND.read_text())
    for name in given.rows:
        found[name] = asdict(tried(name, given.kept))
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
    text = page(found)
    if given.check:
        return int(PAGE.read_text() != text)
    if given.page or given.rows:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
