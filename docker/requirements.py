"""Prints what the images install beside arg_dist itself, a requirement a line.

    python docker/requirements.py pyproject.toml

These are its dependencies with those of the extra `train`, and what builds it. They change seldom,
so they are a layer of their own, which a change of the package's code leaves alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRA = "train"


def requirements(path: Path) -> list[str]:
    """The requirements that the pyproject.toml at `path` names; extras of its own are followed.

    Raises:
        KeyError: an extra is named that the file does not have.
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
