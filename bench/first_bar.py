"""From a fresh clone to the first final bar on screen: the first time, with nothing cached, and the second."""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def run(clone: Path, environment: dict[str, str]) -> tuple[float, float]:
    """(seconds until the first final bar, seconds of it before the demo itself began)."""
    begin = time.time()
    command = ["make", "demo", "ARGS=--seconds 15 --json"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"make demo is not OK:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    before = result["started_at"] - begin
    return before + result["first_bar_s"], before


def main() -> None:
    table = Table(title="make demo to the first final bar, s")
    for name in ("", "all", "of it making the environment"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # PostgreSQL, started by root, runs as somebody else
        root = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        ).stdout.strip()
        clone = Path(folder) / "tapedeck"
        subprocess.run(["git", "clone", "-q", root, str(clone)], check=True)
        environment = os.environ | {"TAPEDECK_CACHE_DIR": f"{folder}/cache", "PIP_NO_CACHE_DIR": "1"}
        environment.pop("VIRTUAL_ENV", None)
        for name in ("first time", "second time"):
            whole, before = run(clone, environment)
            table.add_row(name, f"{whole:.1f}", f"{before:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
