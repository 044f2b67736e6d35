"""Who may import whom: the contracts of pyproject.toml."""

import subprocess
import sys
from pathlib import Path


def test_the_import_rules_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
