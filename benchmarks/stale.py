"""Which figures in README and docs are older than the code they speak of, by commit.

    python -m benchmarks.stale

A figure's file in ``benchmarks/results/`` names its command, which says what code it speaks of, and
its commit. It is older than that code if the code has changed since, other than in comments and
docstrings.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from benchmarks.compare.methods import without_docstrings

ROOT = Path(__file__).resolve().parents[1]
CORE = ("arg_dist/algorithm.py", "arg_dist/step.py", "arg_dist/terms.py", "arg_dist/subspace")
"""What decides about a step."""
SPEAKS_OF = {
    "compare": (*CORE, "arg_dist/config.py", "arg_dist/model_groups.py"),
    "cola": (*CORE, "arg_dist/config.py", "arg_dist/model_groups.py"),
    "sketched": (*CORE, "arg_dist/config.py"),
    "rank_decay": ("arg_dist/subspace/range_finder.py", "arg_dist/subspace/rank.py"),
    "step": CORE,
    "refresh": CORE,
    "batches": CORE,
    "overhead": (*CORE, "arg_dist/sharding"),
    "host_time": (*CORE, "arg_dist/sharding"),
    "scaling": (*CORE, "arg_dist/sharding", "arg_dist/engines"),
    "overlap": (*CORE, "arg_dist/sharding", "arg_dist/engines"),
    "network": (*CORE, "arg_dist/sharding", "arg_dist/engines"),
    "memory": (*CORE, "arg_dist/sharding", "arg_dist/engines", "arg_dist/packing.py"),
    "train_lm": ("arg_dist/checkpoint", "arg_dist/saving.py", "launchers/pretraining"),
}
"""By benchmark or launcher, files and folders whose change makes its figures old."""
_COMMAND = re.compile(rf"\b({'|'.join(SPEAKS_OF)})\b")
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")
_FIGURES = re.compile(r"\b(20\d\d-\d\d-\d\d-[\w-]+\.md)\b")


@dataclass(frozen=True)
class Checkout:
    """A checkout with its history."""

    root: Path

    def git(self, *words: str) -> str:
        """What git prints; "" if it fails."""
        done = subprocess.run(
            ["git", "-C", str(self.root), *words], capture_output=True, text=True, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    @cached_property
    def order(self) -> dict[str, int]:
        """Commits by age, the newest first; empty without a history."""
        return {commit: age for age, commit in enumerate(self.git("rev-list", "HEAD").split())}

    def commit_of(self, results: str) -> str | None:
        """The newest commit that a file of results says its code was of; None if unknown."""
        row = self._row(results, "code")
        found = {self.git("rev-parse", "--verify", f"{c}^{{commit}}") for c in _COMMIT.findall(row)}
        if "this commit" in row or "adds this file" in row:
            added = ("log", "--diff-filter=A", "--format=%H", "--", f"benchmarks/results/{results}")
            found.add(self.git(*added))
        known = [commit.strip() for commit in found if commit.strip() in self.order]
        return min(known, key=self.order.__getitem__, default=None)

    def speaks_of(self, results: str) -> Sequence[str]:
        """The files and folders of which a file of results speaks."""
        named = _COMMAND.findall(self._row(results, "command"))
        return SPEAKS_OF[named[0]] if named else CORE

    def _row(self, results: str, key: str) -> str:
        text = (self.root / "benchmarks/results" / results).read_text()
        found = re.search(rf"^\| {key} \| (.*) \|$", text, re.MULTILINE)
        return found[1] if found else ""

    def changed_since(self, commit: str, paths: Sequence[str]) -> list[str]:
        """Python files under `paths` that have changed since `commit`: the first three."""
        names = self.git("diff", "--name-only", commit, "--", *paths).split()
        changed = (name for name in names if name.endswith(".py") and self._differs(name, commit))
        return list(islice(changed, 3))

    def _differs(self, name: str, commit: str) -> bool:
        path = self.root / name
        return _meaning(self.git("show", f"{commit}:{name}")) != _meaning(
            path.read_text() if path.exists() else ""
        )


def _meaning(code: str) -> str:
    return ast.dump(without_docstrings(ast.parse(code)))


@dataclass(frozen=True)
class Stale:
    """A file of results that is older than the code it speaks of.

    Attributes:
        results: its name.
        commit: of the code that was measured; None if the history does not have it.
        changed: some of the files that have changed since.
        places: pages and lines that name it.
    """

    results: str
    commit: str | None
    changed: Sequence[str]
    places: Sequence[str]

    def __str__(self) -> str:
        why = "names no commit of this history"
        if self.commit is not None:
            why = f"is of {self.commit[:7]}, before changes of {', '.join(self.changed)}"
        return f"{self.results} {why}: {', '.join(self.places)}"


def stale(root: Path = ROOT) -> Iterator[Stale]:
    """The results that README and docs name, and that are older than the code they speak of.

    Raises:
        FileNotFoundError: a file that is named is not there.
    """
    checkout, places = Checkout(root), defaultdict(list)
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            for results in dict.fromkeys(_FIGURES.findall(line)):
                places[results].append(f"{page.relative_to(root)}:{number}")
    for results, named in sorted(places.items()):
        commit = checkout.commit_of(results)
        changed = checkout.changed_since(commit, checkout.speaks_of(results)) if commit else []
        if changed or commit is None:
            yield Stale(results, commit, changed, named)


def main() -> int:
    """Print them; 1 if there are any, 2 without a history."""
    if not Checkout(ROOT).order:
        print("stale: needs a git checkout with its history", file=sys.stderr)
        return 2
    found = list(stale())
    for each in found:
        print(each)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
