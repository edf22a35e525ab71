"""The benchmark runs and reports; how long things take is not tested."""

import json

import pytest

from scripts.benchmark import PARTS, main
from scripts.benchmarks import figure, scaling

SIZES = {
    "warmup": 0,
    "repeats": 2,
    "num_workers": 0,
    "backbone": "tiny",
    "index_images": 12,
    "index_size": 32,
    "loader_images": 2,
    "loader_crop": 64,
    "eval_images": 2,
    "eval_crop": 32,
    "eval_batch": 2,
}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_reports_medians_between_least_and_most(part, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main([part, *FLAGS, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    table = capsys.readouterr().out
    assert rows and all(row["part"] == part and row["name"] in table for row in rows)
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)


def test_the_figure_shows_each_measurement_against_its_size(tmp_path, monkeypatch):
    def draw(curves, *rest):
        drawn.update(curves)
        figure.draw_scaling(curves, *rest)

    drawn, path = {}, tmp_path / "scaling.png"
    values = {"batch": [2, 3], "crop": [64], "task": ["15-1"], "mem_size": [5]}
    monkeypatch.setattr(scaling, "AXES", values)
    monkeypatch.setattr(scaling, "draw_scaling", draw)
    assert main(["scaling", *FLAGS, "--batch=2", "--crop=48", "--figure", str(path)]) == 0
    sizes = {axis: [size for size, _ in points] for axis, points in drawn.items()}
    assert sizes == {"batch": [2, 3], "crop": [64 * 64], "task": [17], "mem_size": [5]}
    assert path.read_bytes().startswith(b"\x89PNG")
