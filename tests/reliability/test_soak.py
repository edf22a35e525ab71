"""A long run needs no more memory and no more open files at its end than near its start."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.runs import RUN, STEP_1, copy, flags, run, watch

pytestmark = pytest.mark.slow


def _measure(file, number, what):
    """At each new last.pth: MiB that are resident, and open files."""
    if what.startswith("os.rename .last.pth."):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        handles = len(os.listdir("/proc/self/fd"))
        os.write(file, f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.1f} {handles}\n".encode())


def _start(path):
    watch(partial(_measure, os.open(path, os.O_CREAT | os.O_WRONLY)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_300_iterations_with_flat_memory_and_file_handles(root, step_0, place):
    saved, measured = copy(step_0.folder, place / "saved"), place / "measured"
    settings = flags(root, saved, **{**STEP_1, "bs": 1, "epochs": 36})
    outcome = run(settings, prepare=partial(_start, measured))
    assert outcome.returncode == 0, outcome.stderr
    iterations = int(outcome.stdout.split(" iterations an epoch")[0].split()[-1])
    rows = [tuple(map(float, line.split())) for line in measured.read_text().splitlines()]
    assert len(rows) == 36 and 36 * iterations >= 300
    memory, handles = zip(*rows[4:], strict=True)
    print(f"soak of {36 * iterations} iterations: {memory[0]} to {memory[-1]} MiB, {handles[-1]} files")
    assert max(handles) == min(handles)
    assert max(memory[-8:]) - max(memory[:8]) < 16
    assert (saved / "models" / RUN / "step_1" / "metrics.json").is_file()
