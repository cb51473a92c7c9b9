"""The benchmark of training runs: on a tiny model here, with the command that measures a GPU there."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.process
def test_the_client_is_compared_with_the_bare_script():
    small = ["--size", "tiny", "--device", "cpu", "--batch-size", "2", "--length", "16", "--steps", "1", "--pairs", "1"]
    command = [sys.executable, "-m", "benchmarks.training", *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "64", "160"]
    for row in rows:
        client, bare, ratio = map(float, (cell.replace(",", "") for cell in row[1:4]))
        assert ratio == pytest.approx(client / bare, rel=0.03)  # of numbers that are shown rounded
