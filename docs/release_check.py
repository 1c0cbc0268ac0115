"""Builds the source archive and the wheel, and refuses what PyPI would show or do wrongly.

python docs/release_check.py               says what stands in the way of a release
python docs/release_check.py --out dist    leaves both files there, if nothing does

The address of the project is in one place, `Repository` under `[project.urls]` of pyproject.toml.
PyPI shows README.md alone, so its links to files of the checkout are made absolute in what is
built: they lead to the tag of the version there, in the form that GitHub and GitLab serve.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("arg_dist", "ds_configs", "pyproject.toml", "README.md", "LICENSE")
"""All that a build reads."""
URLS = ("Repository", "Issues", "Changelog")
"""What a user of PyPI needs to find, as keys of `[project.urls]`."""
UNRELEASED = "It is not on PyPI yet"
"""What `INSTALLING` say before the first release."""
INSTALLING = ("README.md", "docs/getting-started.md")
LINK = re.compile(r"```.*?```|(!?)(\[[^\]]*\]\()([^)\s]+)\)", re.DOTALL)
"""A link, or a block of code, in which nothing is a link."""


def main() -> int:
    """Builds, checks, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for both files if nothing is wrong")
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT, help="if not this one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy, built = Path(folder) / "sources", Path(folder) / "built"
        project = copied(given.checkout, copy)
        faults = [*undeclared(project, given.checkout), *build(copy, built)]
        faults += [fault for wheel in built.glob("*.whl") for fault in shown_wrongly(wheel)]
        for fault in faults:
            print(f"release_check: {fault}", file=sys.stderr)
        files = sorted(built.iterdir())
        if given.out and not faults:
            given.out.mkdir(parents=True, exist_ok=True)
            files = [Path(shutil.copy(file, given.out)) for file in files]
        print("\n".join(f"{file.name}  {file.stat().st_size:,} bytes" for file in files))
    return 1 if faults else 0


def copied(checkout: Path, copy: Path) -> dict[str, Any]:
    """Copies what a build reads, with the links of README.md made absolute.

    What earlier builds left in the checkout would be packed, too; hence the copy.

    Returns:
        The table `project` of pyproject.toml.
    """
    copy.mkdir()
    for name in SOURCES:
        if (checkout / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(checkout / name, copy / name, ignore=left_out)
        else:
            shutil.copy(checkout / name, copy / name)
    project: dict[str, Any] = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    repository = project.get("urls", {}).get("Repository")
    if repository:
        readme = copy / "README.md"
        readme.write_text(absolute(readme.read_text(), repository, project["version"], checkout))
    return project


def absolute(text: str, repository: str, version: str, checkout: Path) -> str:
    """The text with its links to files of the checkout leading to the tag of the version."""

    def replaced(found: re.Match[str]) -> str:
        image, label, link = found[1], found[2], found[3]
        if label is None or "://" in link:
            return found[0]
        kind = "raw" if image else "tree" if (checkout / link).is_dir() else "blob"
        path = f"README.md{link}" if link.startswith("#") else link
        return f"{image}{label}{repository.rstrip('/')}/{kind}/v{version}/{path})"

    return LINK.sub(replaced, text)


def undeclared(project: dict[str, Any], checkout: Path) -> list[str]:
    """What a release needs that pyproject.toml, CHANGELOG.md or a page does not say."""
    version, faults = project["version"], []
    missing = [key for key in URLS if not project.get("urls", {}).get(key)]
    if missing:
        faults.append(
            f"pyproject.toml: [project.urls] has no {', '.join(missing)}; give the public "
            'addresses, as in Repository = "https://HOST/OWNER/NAME"'
        )
    if f"\n## [{version}]" not in (checkout / "CHANGELOG.md").read_text():
        faults.append(
            f"CHANGELOG.md: no section [{version}], the version in pyproject.toml; put what is "
            f"under [Unreleased] below a heading '## [{version}] - YEAR-MONTH-DAY'"
        )
    for page in INSTALLING:
        if UNRELEASED in (checkout / page).read_text():
            faults.append(f"{page}: says {UNRELEASED!r}; remove that sentence")
    return faults


def build(sources: Path, out: Path) -> list[str]:
    """Builds the source archive, from it the wheel, and has twine read both."""
    out.mkdir()
    modules = [
        ("build", ["--no-isolation", "--outdir", str(out), str(sources)]),
        ("twine", ["check", "--strict", *map(str, (out / "*.whl", out / "*.tar.gz"))]),
    ]
    for module, arguments in modules:
        words = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            told = (done.stdout + done.stderr).strip()[-2000:]
            return [
                f"{module} failed; correct what it says (the extra `test` installs it):\n{told}"
            ]
    return []


def shown_wrongly(wheel: Path) -> list[str]:
    """What the page on PyPI, which is made from the wheel's metadata, would show wrongly."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        text = str(message_from_bytes(archive.read(name)).get_payload())
    links = [found[3] for found in LINK.finditer(text) if found[3] and "://" not in found[3]]
    if not links:
        return []
    return [
        f"README.md: {len(links)} links would lead nowhere on PyPI ({links[0]}, ...); give "
        "Repository under [project.urls] of pyproject.toml, which makes them absolute"
    ]


if __name__ == "__main__":
    sys.exit(main())
