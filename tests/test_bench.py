"""Committed results and the tables made from them belong together."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def test_tables_are_what_the_results_say():
    command = [sys.executable, str(BENCH / "tables.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
