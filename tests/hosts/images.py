"""Images without an engine: buildah builds them below a folder of the test, and runs them.

buildah's storage driver `vfs` copies files and mounts nothing, and its isolation `chroot` keeps the
network namespace that it is started in: so a container's host is a namespace of
:mod:`tests.hosts.namespaces`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.launch.launching import ROOT
from tests.patience import patient

CACHE = "ARG_DIST_IMAGE_CACHE"
"""Variable that names a folder in which base image and wheels stay between runs of the tests."""
SYSTEM = ("ca-certificates", "python3", "python3-venv", "tini")
"""What the base image has, so that a build asks no Debian mirror."""
SUITE = "bookworm"
PYTHON = (3, 11)
"""The suite's."""
BASE = f"localhost/base:{SUITE}"
IMAGE = "localhost/arg-dist:cpu"


@functools.cache
def obstacle() -> str | None:
    """Why no image can be built and run on this machine; None if one can."""
    missing = [name for name in ("buildah", "debootstrap", "git") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; Debian: apt-get install {' '.join(missing)}"
    if not (ROOT / ".git").exists():
        return "no git repository, from which to take a clean checkout"
    if sys.version_info[:2] != PYTHON:
        return f"the wheels are those of this Python; the image has {'.'.join(map(str, PYTHON))}"
    return None if os.geteuid() == 0 else "buildah with isolation chroot needs root"


class Images:
    """Images and containers that lie below `folder`, a new one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "packed").mkdir(exist_ok=True)

    def command(self, *words: object) -> list[str]:
        """buildah's command line for `words`."""
        where = ["--root", self.folder / "storage", "--runroot", self.folder / "run"]
        # what it packs goes below the folder, too
        program = ("env", f"TMPDIR={self.folder / 'packed'}", "buildah", "--storage-driver", "vfs")
        return [str(word) for word in (*program, *where, *words)]

    def do(self, *words: object, seconds: float = 120) -> str:
        """What buildah prints; fails with its errors, or after `seconds`."""
        return run(self.command(*words), seconds=seconds)

    def settings(self, image: str) -> dict[str, Any]:
        """An image's configuration, as ``docker image inspect`` shows it."""
        found = json.loads(self.do("inspect", "--type", "image", image))
        return found["Docker"]["config"]

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[str]:
        """A container of `image`; its name."""
        name = self.do("from", "--pull-never", image, seconds=600).strip()
        try:
            yield name
        finally:
            self.do("rm", name)

    def start(
        self,
        container: str,
        words: Sequence[object],
        *,
        variables: Mapping[str, str] | None = None,
        folders: Mapping[Path, str] | None = None,
    ) -> list[str]:
        """The command line that runs `words` in a container, in the namespace it is started in.

        Args:
            container: its name.
            words: a command of the container.
            variables: its environment, beside the image's.
            folders: what of this machine is seen in the container, and where.
        """
        options = [word for item in (variables or {}).items() for word in ("--env", "=".join(item))]
        for outside, inside in (folders or {}).items():
            options += ["--volume", f"{outside}:{inside}"]
        return self.command("run", "--isolation", "chroot", *options, container, "--", *words)

    def remove(self) -> None:
        """Leaves nothing, mounts included."""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if (place := line.split()[1]).startswith(f"{self.folder}/"):
                run(["umount", "--lazy", place], seconds=30)
        shutil.rmtree(self.folder)


def run(words: Sequence[object], *, seconds: float) -> str:
    """What a command prints to its standard output; fails with all of it if the command does."""
    finished = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=patient(seconds),
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, (
        f"{' '.join(map(str, words))}: exit code {finished.returncode}\n"
        f"{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    )
    return finished.stdout


def checkout(folder: Path) -> Path:
    """The last commit, without history, in the new `folder`."""
    archive = folder.with_suffix(".tar")
    folder.mkdir()
    run(["git", "-C", ROOT, "archive", "--output", archive, "HEAD"], seconds=60)
    run(["tar", "-C", folder, "-xf", archive], seconds=60)
    archive.unlink()
    return folder


def make_base(images: Images, cache: Path) -> None:
    """A Debian with Python as the image :data:`BASE`; its files stay in `cache`."""
    packed = cache / f"{SUITE}-{_digest(SYSTEM)}.tar.gz"
    if not packed.exists():
        root = images.folder / "debian"
        chosen = f"--include={','.join(SYSTEM)}"
        run(["debootstrap", "--variant=minbase", chosen, SUITE, root], seconds=1800)
        for left in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / left)
        made = packed.with_suffix(".part")
        run(["tar", "-C", root, "--one-file-system", "-czf", made, "."], seconds=300)
        made.rename(packed)
        shutil.rmtree(root)
    container = images.do("from", "scratch").strip()
    images.do("add", "--quiet", container, packed, "/", seconds=300)
    images.do("commit", "--quiet", "--rm", container, BASE, seconds=300)


def fetch_wheels(sources: Path, cache: Path) -> None:
    """Fills the wheelhouse of the checkout `sources`; the wheels stay in `cache`."""
    asked = [(sources / name).read_text() for name in ("constraints.txt", "pyproject.toml")]
    wheels = cache / f"wheels-{_digest(asked)}"
    complete = wheels / "complete"
    if not complete.exists():
        python = f"PYTHON={sys.executable}"
        run(["env", python, "bash", sources / "docker/make_wheelhouse.sh", wheels], seconds=1800)
        complete.touch()
    for wheel in wheels.glob("*.whl"):
        shutil.copy(wheel, sources / "docker/wheelhouse")


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
