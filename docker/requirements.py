"""Prints what the images install in addition to arg_dist itself, one requirement per line.

    python docker/requirements.py pyproject.toml

These are its dependencies, those of the extra `train`, and its build requirements. They rarely
change, so they are a separate layer that code changes do not rebuild.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRA = "train"


def requirements(path: Path) -> list[str]:
    """The requirements in the pyproject.toml at `path`; the project's own extras are expanded.

    Raises:
        KeyError: the file lacks a referenced extra.
    """
    content = tomllib.loads(path.read_text())
    project = content["project"]
    found = [*content["build-system"]["requires"], *project["dependencies"]]
    waiting = [EXTRA]
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[(.+)\]", requirement)
            if own is None:
                found.append(requirement)
            else:
                waiting += own[1].split(",")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1])), sep="\n")
