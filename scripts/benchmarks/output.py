"""What is printed: the machine, and a table of the rows."""

import os
import platform
from datetime import date
from pathlib import Path

import torch
import torchvision

from data_loader.data_loaders import cores
from scripts.benchmarks.timing import Row
from utils.distributed import device


def environment() -> dict[str, str]:
    """What a figure needs beside it: processor, cores, GPU, versions, date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), None)
    gpu = torch.cuda.get_device_name() if device().type == "cuda" else "none"
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return {
        "processor": f"{model or platform.processor() or platform.machine()}, {cores()} cores",
        "load before": load,
        "gpu": gpu,
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }


def format_rows(rows: list[Row]) -> str:
    """The table: a line per row."""
    lines = [f"{'part':<8}{'measured':<56}{'median':>10}{'least':>10}{'most':>10}     {'MiB':>10}"]
    for row in rows:
        values = "".join(f"{value:>10.3f}" for value in (row.median, row.low, row.high))
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        lines.append(f"{row.part:<8}{row.name:<56}{values} {row.unit:<4}{peak:>10}")
    return "\n".join(lines)
