"""The benchmark runs and reports; how long things take is not tested."""

import json
from contextlib import nullcontext

import pytest
import torch

from scripts import benchmark
from tests.helpers import code_of

SIZES = {
    "warmup": 1,
    "repeats": 2,
    "num_workers": 0,
    "backbone": "tiny",
    "batch": 2,
    "crop": 48,
    "index_images": 12,
    "index_size": 32,
    "loader_images": 2,
    "loader_crop": 64,
    "eval_images": 2,
    "eval_crop": 32,
    "eval_batch": 2,
}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.mark.parametrize("part", [part for part in benchmark.PARTS if part != "scaling"])
def test_a_part_reports_medians_between_least_and_most(part, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert benchmark.main([part, *FLAGS, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    table = capsys.readouterr().out
    assert rows and all(row["part"] == part and row["name"] in table for row in rows)
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)


def test_the_figure_shows_each_measurement_against_its_size(tmp_path, monkeypatch, capsys):
    def draw(curves, *rest):
        drawn.update(curves)
        draw_scaling(curves, *rest)

    drawn, path, draw_scaling = {}, tmp_path / "scaling.png", benchmark.draw_scaling
    values = {"batch": [2, 3], "crop": [64], "task": ["15-1"], "mem_size": [5]}
    axes = {axis: (values[axis], *rest) for axis, (_, *rest) in benchmark.AXES.items()}
    monkeypatch.setattr(benchmark, "AXES", axes)
    monkeypatch.setattr(benchmark, "draw_scaling", draw)
    assert benchmark.main(["scaling", *FLAGS, "--figure", str(path)]) == 0
    sizes = {axis: [size for size, _ in points] for axis, points in drawn.items()}
    assert sizes == {"batch": [2, 3], "crop": [64 * 64], "task": [17], "mem_size": [5]}
    assert path.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(row.name in table for points in drawn.values() for _, row in points)


def test_whole_is_timed_between_two_halves_of_bare():
    calls = []
    args = benchmark.Namespace(warmup=1, repeats=3)
    bare, whole = ("bare, small", lambda: calls.append("b")), ("whole", lambda: calls.append("w"))
    under, over, quotient = benchmark.compare(bare, whole, args, "ms")
    assert "".join(calls) == "bbb" + "wwww" + "bbb"  # each with a warm-up
    assert (len(under.values), len(over.values)) == (4, 3)
    assert quotient.name == "whole / bare" and quotient.unit == "x"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_comes_before_a_call_is_not_timed(monkeypatch, kind):
    """Nor what the device has still to do when a call begins: events stand in its own order."""
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)

        def elapsed_time(self, later):
            return 1000 * (later.time - self.time)

    monkeypatch.setattr(benchmark, "device", lambda: torch.device(kind))
    monkeypatch.setattr(benchmark.timeit, "default_timer", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seconds = benchmark.call_times(lambda: next(clock), 3, before=lambda: [next(clock), next(clock)])
    assert seconds == [2, 2, 2]


def test_the_table_ends_before_a_batch_that_finds_no_memory(monkeypatch, capsys):
    def paste(args):
        if args.batch == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [benchmark.Row("paste", "s", [1.0])]

    monkeypatch.setattr(benchmark, "make_synthetic_voc", lambda *_: None)
    monkeypatch.setattr(benchmark, "prepared_step", lambda *_: nullcontext((None, None)))
    monkeypatch.setattr(benchmark, "chosen_batches", lambda *_: None)
    monkeypatch.setattr(benchmark, "whole_step", lambda *_: [])
    monkeypatch.setattr(benchmark, "paste", paste)
    rows = list(benchmark.table(benchmark.parse(["table", *FLAGS])))
    assert len(rows) == 1 and "no memory for a batch of 4" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--repeats=0"], ["--index_size=8"], ["--json=missing/report.json"]])
def test_a_value_that_no_part_can_use_is_refused(flags, capsys):
    assert code_of(lambda: benchmark.main(["loss", *flags])) == 2
    assert flags[0].split("=")[0] in capsys.readouterr().err.splitlines()[-1]
