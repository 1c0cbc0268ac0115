"""A test never imports a script of a launch: its deadline would end pytest."""

from __future__ import annotations

import sys

from tests.launch.launching import ROOT


def test_no_test_imports_a_script_with_a_deadline():
    launches = ROOT / "tests" / "launch"
    scripts = {
        path.stem for path in launches.glob("*.py") if "_traceback_later(" in path.read_text()
    }
    assert len(scripts) > 5
    for path in sorted(ROOT.glob("tests/*/test_*.py")):
        lines = [line for line in path.read_text().splitlines() if "import" in line.split()]
        assert not [line for line in lines if scripts & set(line.replace(".", " ").split())], path
    assert not scripts & {name.rpartition(".")[2] for name in sys.modules if "tests.launch" in name}
