"""Time and memory of a piece of work: warm-up, repeats, median and spread."""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.distributed import device, peak_memory


@dataclass
class Row:
    """One measurement: median, least and most of its repeats in `unit`; memory taken, MiB."""

    part: str
    name: str
    unit: str
    median: float
    low: float
    high: float
    repeats: int
    peak_mib: float | None = None


def measure(
    part: str,
    name: str,
    work: Callable[[], object],
    args: argparse.Namespace,
    unit: str = "s",
    items: int = 1,
    before: Callable[[], object] = lambda: None,
) -> Row:
    """Time work() per item, after warm-up; before() comes ahead of each call, untimed."""
    peak = _warm_up(work, args, before)
    times = []
    for _ in range(args.repeats):
        before()
        times.append(_seconds(work))
    return _row(part, name, times, unit, items, peak)


def compare(
    part: str,
    under: tuple[str, Callable[[], object]],
    over: tuple[str, Callable[[], object]],
    args: argparse.Namespace,
    unit: str = "s",
    items: int = 1,
) -> list[Row]:
    """Time two named works and their quotient, `over` between two halves of `under`.

    So a drift of the machine's speed cancels, while calls of the same work follow each other without
    a break in which a loader's workers could get ahead.
    """
    peaks = [_warm_up(work, args) for _, work in (under, over)]
    half = -(-args.repeats // 2)
    low = [_seconds(under[1]) for _ in range(half)]
    high = [_seconds(over[1]) for _ in range(args.repeats)]
    low += [_seconds(under[1]) for _ in range(half)]
    rows = [
        _row(part, name, times, unit, items, peak)
        for (name, _), times, peak in zip((under, over), (low, high), peaks, strict=True)
    ]
    names = (name.split(",")[0] for name in (over[0], under[0]))
    return [*rows, ratio(part, " / ".join(names), rows[1], rows[0])]


def _warm_up(work, args, before=lambda: None):
    """Peak memory of the warm-up, MiB: the first call finds nothing allocated for it yet."""
    taken = _reset_peak()
    for _ in range(max(1, args.warmup)):
        before()
        work()
    return peak_memory() - taken


def _row(part, name, seconds, unit, items, peak):
    factor = {"s": 1, "ms": 1000}[unit] / items
    values = [value * factor for value in seconds]
    spread = statistics.median(values), min(values), max(values)
    return Row(part, name, unit, *spread, len(values), peak)


def ratio(part: str, name: str, over: Row, under: Row) -> Row:
    """The quotient of two medians, and the least and most that the repeats allow."""
    quotients = over.median / under.median, over.low / under.high, over.high / under.low
    return Row(part, name, "x", *quotients, min(over.repeats, under.repeats))


def _seconds(work):
    """Time of one call; on CUDA between two events, so that the device's work counts."""
    if device().type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _reset_peak():
    """Start of a memory measurement: MiB in use now."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if Path("/proc/self/clear_refs").exists():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()
