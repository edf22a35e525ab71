"""Reports against values computed by hand."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.options import Config, load_config
from data_loader.tasks import get_task
from scripts import results
from scripts.report import class_iou_figure, forgetting_figure, main, mean_iou_figure
from scripts.results import how_tested, published, read_comparisons
from tests.helpers import CLASS_NAMES, PROJECT, code_of, error_line, run_script
from utils.checkpoint import content_digest, json_digest, save_checkpoint, write_json
from utils.metrics import METRICS

COLUMNS = [*results.COLUMNS, *CLASS_NAMES[1:]]


def make_row(method, seed, step, iou=(60,), task="10-5", setting="overlap", **cells) -> dict:
    """A row of results.csv; iou: of the classes of each step so far, the last stands for the rest."""
    classes = {}
    for old_step, names in enumerate(get_task(task, setting).steps[: step + 1]):
        classes |= {CLASS_NAMES[c]: iou[min(old_step, len(iou) - 1)] for c in names}
    defaults = {
        "val_images": 30,
        "test": "centre crop 512",
        "old": 50,
        "all": 50,
        "seconds": 60,
        "background": 90 - 20 * step,
    }
    later = {"new": 40, "hIoU": 45} if step else {}
    where = {"method": method, "task": task, "setting": setting, "seed": seed, "step": step}
    return {**where, **defaults, **later, **classes, **cells}


def make_run(method="EIR", seed=1, task="10-5", **cells) -> list[dict]:
    """Rows of all steps."""
    steps = range(len(get_task(task, "overlap").steps))
    return [make_row(method, seed, step, task=task, **cells) for step in steps]


def write(folder: Path, rows: list[dict], columns=COLUMNS) -> Path:
    """A folder of experiments with these rows."""
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def report(folder: Path, capsys) -> str:
    """Standard output of a report."""
    assert main([str(folder)]) == 0
    return capsys.readouterr().out


def failure(folder: Path, capsys) -> str:
    """The one line on standard error of a report that ends with code 2 and shows nothing."""
    code = code_of(lambda: main([str(folder)]))
    output = capsys.readouterr()
    assert code == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


def tables(text: str, first: str = "method") -> list[dict[str, dict[str, str]]]:
    """The Markdown tables with that first column: method -> column -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([c.strip() for c in x.strip("|").split("|")] for x in block.splitlines())
        if header[0] == first:
            found.append({row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows})
    return found


@pytest.fixture
def two_seeds(tmp_path: Path) -> Path:
    """EIR with two seeds, and joint with one row each."""
    rows = [
        make_row("EIR", 1, 0, [80], all=80),
        make_row("EIR", 1, 1, [70, 60], seconds=120, memory_bytes=512),
        make_row("EIR", 1, 2, [75, 40, 50], seconds=30, memory_bytes=1024, old=60, all=50.04),
        make_row("joint", 1, 2, [90], old=80, all=80, seconds=300),
        make_row("EIR", 2, 0, [80], all=74),
        make_row("EIR", 2, 1, [70, 60], seconds=120, memory_bytes=512),
        make_row("EIR", 2, 2, [76, 50, 50], seconds=150, memory_bytes=3072, old=62, all=50),
        make_row("joint", 2, 2, [90], old=84, all=84, seconds=360),
    ]
    return write(tmp_path, rows)


class TestTable:
    def test_mean_and_deviation_over_seeds_at_the_last_step(self, two_seeds, capsys):
        [table] = tables(report(two_seeds, capsys))
        assert table["EIR"] == {
            "old": "61.0 ± 1.4",
            "new": "40.0 ± 0.0",
            "all": "50.0 ± 0.0",
            "hIoU": "45.0 ± 0.0",
            "mean of steps": "59.0 ± 1.4",  # (80 + 50 + 50.04) / 3 and (74 + 50 + 50) / 3
            "forgetting": "8.0 ± 2.8",  # (10 * 5 + 5 * 20) / 15 and (10 * 4 + 5 * 10) / 15
            "minutes": "4.5 ± 1.4",  # 3.5 and 5.5
            "memory KiB": "2.0 ± 1.4",
            "seeds": "2",
        }

    def test_all_after_each_step(self, two_seeds, capsys):
        [table] = tables(report(two_seeds, capsys), "all, after step")
        assert list(table) == ["EIR"] and list(table["EIR"]) == ["0", "1", "2"]
        assert list(table["EIR"].values()) == ["77.0 ± 4.2", "50.0 ± 0.0", "50.0 ± 0.0"]

    def test_joint_has_one_step_and_no_memory(self, two_seeds, capsys):
        [table] = tables(report(two_seeds, capsys))
        joint = table["joint"]
        assert joint["old"] == "82.0 ± 2.8" and joint["minutes"] == "5.5 ± 0.7"
        assert joint["mean of steps"] == joint["forgetting"] == joint["memory KiB"] == "-"

    def test_one_seed_is_a_mean_without_a_deviation(self, tmp_path, capsys):
        write(tmp_path, make_run(memory_bytes=2048))
        [table] = tables(report(tmp_path, capsys))
        means, others = ["50.0", "40.0", "50.0", "45.0", "50.0"], ["0.0", "3.0", "2.0", "1"]
        assert list(table["EIR"].values()) == [*means, *others]

    def test_unfinished_runs_are_named_and_left_out(self, tmp_path, capsys):
        broken, begun = make_run(seed=2, old=0)[:2], make_run("kd, 1", old=0)[:1]
        write(tmp_path, [*make_run(), *broken, *begun])
        output = report(tmp_path, capsys)
        [table] = tables(output)
        assert list(table) == ["EIR"] and table["EIR"]["old"] == "50.0"
        assert "\nunfinished: EIR seed 2 (2 of 3 steps); kd, 1 seed 1 (1 of 3 steps)\n" in output

    def test_classes_without_images_are_named(self, tmp_path, capsys):
        write(tmp_path, [make_row("EIR", 1, 0, without_images="train"), *make_run()[1:]])
        assert "no image to learn from" not in report(tmp_path, capsys)  # of another step than the last
        rows = make_run()
        rows[-1]["without_images"] = "train; bus"
        assert "\nbus, train: no image" in report(write(tmp_path, rows), capsys)
        write(tmp_path, make_run(), [column for column in COLUMNS if column != "without_images"])
        assert "no image to learn from" not in report(tmp_path, capsys)  # a file of before the column

    def test_nothing_finished_is_no_table_and_no_figure(self, tmp_path, capsys):
        write(tmp_path, make_run()[:2])
        output = report(tmp_path, capsys)
        assert tables(output) == [] and "unfinished: EIR seed 1 (2 of 3 steps)" in output
        assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "report.md"}

    def test_methods_keep_their_order_and_each_task_has_a_table(self, tmp_path, capsys):
        runs = [make_run(m, s, t) for s in (1, 2) for t in ("19-1", "10-10") for m in ("z", "a", "m")]
        disjoint = make_run("d", task="19-1", setting="disjoint")
        write(tmp_path, [*(row for run in runs for row in run), *disjoint])
        output = report(tmp_path, capsys)
        headings = ["## 19-1, overlap", "## 10-10, overlap", "## 19-1, disjoint"]
        assert re.findall("^## .*", output, re.MULTILINE) == headings
        assert [list(table) for table in tables(output)] == [["z", "a", "m"], ["z", "a", "m"], ["d"]]

    def test_a_task_of_one_step_has_no_means_over_steps(self, tmp_path, capsys):
        write(tmp_path, [make_row("EIR", 1, 0, task="joint")])
        [table] = tables(report(tmp_path, capsys))
        assert table["EIR"]["new"] == table["EIR"]["mean of steps"] == table["EIR"]["forgetting"] == "-"

    def test_the_file_has_what_standard_output_has(self, two_seeds, capsys):
        output = report(two_seeds, capsys)
        text = (two_seeds / "report.md").read_text(encoding="utf-8")
        assert tables(text) == tables(output)
        assert "*mean of steps*" in text
        assert f"report      {two_seeds / 'report.md'}" in output

    def test_a_file_of_earlier_experiments_gives_the_report_beside_it(self, tmp_path, capsys):
        folder = PROJECT / "docs" / "results" / "methods_15-1"
        shutil.copy(folder / "results.csv", tmp_path)
        report(tmp_path, capsys)
        assert (tmp_path / "report.md").read_bytes() == (folder / "report.md").read_bytes()


class TestPublished:
    @pytest.mark.parametrize(
        ("task", "dkd", "dkd_m"),
        [
            ("5-3", ("61.32", "58.98"), ("65.02", "63.32")),
            ("15-1", ("57.46", "70.50"), ("64.09", "72.95")),
        ],
    )
    def test_it_stands_below_the_methods_on_voc_2012(self, tmp_path, capsys, task, dkd, dkd_m):
        write(tmp_path, make_run(task=task, val_images=1449))
        output = report(tmp_path, capsys)
        [table] = tables(output)
        assert list(table) == ["EIR", "DKD (published)", "DKD-M (published)"]
        for method, numbers in (("DKD", dkd), ("DKD-M", dkd_m)):
            row = table[f"{method} (published)"]
            assert (row.pop("hIoU"), row.pop("all")) == numbers
            assert set(row.values()) == {""}
        assert "Decomposed Knowledge Distillation" in output

    @pytest.mark.parametrize(
        "cells",
        [
            {"task": "19-1", "val_images": 1448},
            {"task": "19-1", "val_images": 1449, "test": "whole"},
            {"task": "19-1", "val_images": 1449, "test": "centre crop 512, later classes void"},
            {"task": "19-1", "val_images": 1449, "test": ""},
            {"task": "19-1", "val_images": ""},
            {"task": "19-1", "val_images": 1449, "setting": "disjoint"},
            {"task": "10-5", "val_images": 1449},
        ],
    )
    def test_it_is_left_out_elsewhere(self, tmp_path, capsys, cells):
        write(tmp_path, make_run(**cells))
        assert "published" not in report(tmp_path, capsys)

    @pytest.mark.parametrize(
        ("name", "images", "file"), [("15-5", 1449, "voc"), ("100-50", 2000, "ade")]
    )
    def test_it_is_of_one_order_of_the_classes(self, name, images, file):
        config = load_config(PROJECT / f"configs/config_{file}.json")[0]
        classes = config.data.dataset.classes
        test = how_tested(Config().data)
        assert "DKD" in published(get_task(name, "overlap", classes), images, test)
        other = dict(reversed(classes.items()))
        assert published(get_task(name, "overlap", other), images, test) == {}

    def test_one_run_on_other_images_leaves_it_out(self, tmp_path, capsys):
        own = make_run("own", task="19-1", val_images=150)
        write(tmp_path, make_run(task="19-1", val_images=1449) + own)
        assert "published" not in report(tmp_path, capsys)

    def test_all_numbers_are_those_of_the_source(self):
        voc = {
            "19-1": ((56.95, 76.13), (68.14, 77.04)),
            "15-5": ((67.17, 73.95), (68.96, 74.84)),
            "15-1": ((57.46, 70.50), (64.09, 72.95)),
            "10-1": ((57.21, 60.43), (64.89, 66.20)),
            "5-3": ((61.32, 58.98), (65.02, 63.32)),
        }
        ade = {"100-50": (29.42, 35.55), "100-10": (26.79, 34.53), "50-50": (34.77, 34.39)}
        both = {task: dict(zip(("DKD", "DKD-M"), rows, strict=True)) for task, rows in voc.items()}
        alone = {task: {"DKD": numbers} for task, numbers in ade.items()}
        assert {1449: both, 2000: alone} == results.PUBLISHED


class TestFigures:
    def test_files_decode_and_are_linked(self, two_seeds, capsys):
        report(two_seeds, capsys)
        names = {f"{name}_10-5_overlap.png" for name in ("miou", "heat", "forgetting")}
        assert {path.name for path in two_seeds.glob("*.png")} == names
        text = (two_seeds / "report.md").read_text(encoding="utf-8")
        assert set(re.findall(r"!\[.+\]\((.+)\)", text)) == names
        for name in names:
            assert (two_seeds / name).stat().st_size < 2**20
            with Image.open(two_seeds / name) as image:
                assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5

    def test_mean_iou_has_a_line_a_method_and_joint_dashed(self, two_seeds):
        [comparison] = read_comparisons(two_seeds / "results.csv")
        eir, joint = mean_iou_figure(comparison).axes[0].get_lines()
        assert eir.get_label() == "EIR" and np.allclose(eir.get_ydata(), [77, 50, 50.02])
        band = mean_iou_figure(comparison).axes[0].collections[0].get_paths()[0].vertices
        assert np.allclose(np.unique(band[band[:, 0] == 0, 1]), [77 - 18**0.5, 77 + 18**0.5])
        assert joint.get_label() == "joint" and joint.get_linestyle() == "--"
        assert np.allclose(joint.get_ydata(), 82)

    def test_many_methods_differ_in_colour_or_style(self, tmp_path):
        write(tmp_path, [row for n in range(25) for row in make_run(f"m{n}", task="19-1")])
        [comparison] = read_comparisons(tmp_path / "results.csv")
        lines = mean_iou_figure(comparison).axes[0].get_lines()
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 25
        panels = [axes for axes in class_iou_figure(comparison).axes if axes.get_title()]
        assert [panel.get_title() for panel in panels] == [f"m{n}" for n in range(25)]

    def test_class_iou_is_a_mean_over_seeds_and_empty_where_not_learned(self, two_seeds):
        [comparison] = read_comparisons(two_seeds / "results.csv")
        panel, _ = class_iou_figure(comparison).axes
        assert panel.get_title() == "EIR"
        values = panel.images[0].get_array().filled(np.nan)
        assert values.shape == (21, 3)
        assert np.allclose(values[[0, 1, 11, 20], 2], [50, 75.5, 45, 50])
        assert np.isnan(values[11:, 0]).all() and np.isnan(values[16:, 1]).all()
        assert np.isnan(values).sum() == 10 + 5

    def test_classes_stand_in_learning_order(self, tmp_path):
        write(tmp_path, make_run(task="15-1_b"))
        [comparison] = read_comparisons(tmp_path / "results.csv")
        labels = [label.get_text() for label in class_iou_figure(comparison).axes[0].get_yticklabels()]
        assert labels[:3] == ["background", "dog", "chair"] and len(labels) == 21

    def test_forgetting_shows_numbers_but_for_the_last_step(self, two_seeds):
        [comparison] = read_comparisons(two_seeds / "results.csv")
        axes = forgetting_figure(comparison).axes[0]
        assert [text.get_text() for text in axes.texts] == ["4.5"] * 10 + ["15.0"] * 5
        assert len(axes.get_xticklabels()) == 20


NO_NUMBER = {**make_row("EIR", 1, 0), "cat": "abc"}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], COLUMNS, "is empty"),
        ([], (), "is empty"),
        (make_run(), [c for c in COLUMNS if c not in ("all", "seed")], "lacks the columns seed, all"),
        ([make_run()[0], NO_NUMBER], COLUMNS, "line 3, column cat: 'abc' is not a number"),
        (make_run(all="nan"), COLUMNS, "line 2, column all: 'nan' is not a number"),
        (make_run(seed=""), COLUMNS, "line 2, column seed: '' is not an integer"),
        ([{**make_run()[0], "task": "7-4"}], COLUMNS, "line 2: unknown task '7-4'"),
        ([{**make_run()[0], "step": 3}], COLUMNS, "line 2: task 10-5 has no step 3"),
        (make_run() + make_run(), COLUMNS, "line 5: this method, seed and step have a row already"),
    ],
)
def test_a_bad_csv_is_one_line_and_code_2(tmp_path, capsys, rows, columns, message):
    write(tmp_path, rows, columns)
    error = failure(tmp_path, capsys)
    assert str(tmp_path / "results.csv") in error and message in error


def test_a_line_cut_short_is_named(tmp_path, capsys):
    path = write(tmp_path, make_run()) / "results.csv"
    path.write_text(path.read_text()[:-30])
    assert "line 4 has more or fewer cells than the header" in failure(tmp_path, capsys)


def test_a_folder_that_is_missing_or_bare_is_one_line(tmp_path, capsys):
    assert f"no such folder: {tmp_path / 'nowhere'}" in failure(tmp_path / "nowhere", capsys)
    assert "results.csv" in error_line(run_script("scripts/report.py", tmp_path))


def make_steps(folder: Path, last: int, val_images: int | None = None, **task) -> Path:
    """The folder of a run of 19-1 up to a step, as training writes it; None: by a former version."""
    config = Config()
    config.task.name, config.task.setting = "19-1", "overlap"
    for key, value in task.items():
        setattr(config.task, key, value)
    for step in range(last + 1):
        names = get_task("19-1", "overlap").class_names(step)
        groups = {"overall": 70 - step, "old": 71.5, "new": 30.25, "harmonic": 42.5}
        if step == 0:
            groups |= {"new": None, "harmonic": None}
        iou = {**groups, "by_class": dict.fromkeys(names, 12.5)}
        metrics = {metric: iou for metric in METRICS}
        (folder / f"step_{step}").mkdir(parents=True)
        (folder / f"step_{step}" / "metrics.json").write_text(json.dumps(metrics))
        (folder / f"step_{step}" / "config.json").write_text(json.dumps(config.to_dict()))
        if val_images:
            write_json(folder / f"step_{step}" / "made_from.json", {"val_images": val_images})
    return folder


class TestRun:
    def test_the_table_over_steps_and_the_curve(self, tmp_path, capsys):
        run = make_steps(tmp_path / "overlap_19-1_EIR", 1)
        (run / "step_old").mkdir()
        (run / "step_old" / "metrics.json").write_text("{}")
        output = report(run, capsys)
        rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line}
        assert rows["step"] == ["0", "1"] and rows["new"] == ["-", "30.25"]
        assert rows["all"] == ["70.00", "69.00"] and rows["hIoU"] == ["-", "42.50"]
        assert "mean of steps      69.50  (all, steps 0 to 1)\n" in output
        assert rows["tvmonitor"] == ["-", "12.50"] and rows["train"] == ["12.50", "12.50"]
        assert rows["curve"] == [str(run / "curve.png")] and "published" not in rows
        with Image.open(run / "curve.png") as image:
            assert np.asarray(image.convert("L")).std() > 5

    def test_a_zero_that_is_no_error_is_marked(self, tmp_path, capsys):
        run = make_steps(tmp_path, 1)
        assert "*" not in report(run, capsys)
        path = run / "step_1" / "metrics.json"
        metrics = json.loads(path.read_text())
        iou = metrics["Mean_Intersection_over_Union"]
        iou["by_class"]["train"], iou["without_images"] = 0.0, ["train"]
        path.write_text(json.dumps(metrics))
        marked = [line for line in report(run, capsys).splitlines() if "*" in line]
        assert marked[0].split() == ["train", "12.50", "0.00*"]
        assert len(marked) == 2 and marked[1].startswith("* no image")

    def test_the_mean_of_steps_needs_all_steps(self, tmp_path, capsys):
        run = make_steps(tmp_path, 1)
        shutil.rmtree(run / "step_0")  # as in experiments, whose methods share it
        assert "mean of steps" not in report(run, capsys)

    def test_published_results_stand_below_a_finished_run_on_voc_2012(self, tmp_path, capsys):
        lines = report(make_steps(tmp_path, 1, 1449), capsys).splitlines()
        first = lines.index(f"{'published':<16}{'hIoU':>8}{'all':>8}")
        assert lines[first + 1].split() == ["DKD", "56.95", "76.13"]
        assert lines[first + 2].split() == ["DKD-M", "68.14", "77.04"]
        assert "NeurIPS 2022" in lines[first + 3]

    @pytest.mark.parametrize(
        ("last", "task"), [(0, {}), (1, {"setting": "disjoint"}), (1, {"name": "10-10"})]
    )
    def test_they_are_left_out_of_other_tasks_and_steps(self, tmp_path, capsys, last, task):
        assert "published" not in report(make_steps(tmp_path, last, 1449, **task), capsys)

    @pytest.mark.parametrize("how", ["transform", "masking_value", "allow_val_in_train"])
    def test_they_are_left_out_of_other_tests(self, tmp_path, capsys, how):
        run = make_steps(tmp_path, 1, 1449)
        content = json.loads((run / "step_1/config.json").read_text())
        data = content["data_loader"]["args"]
        if how == "allow_val_in_train":
            data[how] = True
        else:
            data["test"]["args"][how] = {"transform": False, "masking_value": 255}[how]
        (run / "step_1/config.json").write_text(json.dumps(content))
        assert "published" not in report(run, capsys)

    @pytest.mark.parametrize("val_images", [20, None])
    def test_they_are_left_out_on_other_images(self, tmp_path, capsys, val_images):
        assert "published" not in report(make_steps(tmp_path, 1, val_images), capsys)

    @pytest.mark.parametrize(
        "text", ["{", "[]", "{}", '{"Mean_Intersection_over_Union": {}}', "wrong types"]
    )
    def test_damaged_metrics_are_one_line(self, tmp_path, capsys, text):
        path = make_steps(tmp_path, 1) / "step_1" / "metrics.json"
        if text == "wrong types":
            text = path.read_text().replace('"by_class": {', '"by_class": {"a": "b", ')
        path.write_text(text)
        assert failure(tmp_path, capsys).startswith(f"error: cannot read the metrics {path}: ")

    def test_steps_that_were_tested_otherwise_are_named(self, tmp_path, capsys):
        folder = make_steps(tmp_path, 1, val_images=1449)
        assert "different ways" not in report(folder, capsys)
        config = load_config(folder / "step_1" / "config.json")[0]
        config.data.test.args.transform = False
        write_json(folder / "step_1" / "config.json", config.to_dict())
        assert (
            "the steps were tested in different ways, not to be compared: "
            "0: centre crop 512, 1449 images; 1: whole, 1449 images"
        ) in report(folder, capsys)

    def test_changed_numbers_are_refused_and_a_stale_step_is_named(self, tmp_path, capsys):
        folder = make_steps(tmp_path, 1)
        first, second = folder / "step_0", folder / "step_1"
        save_checkpoint(first / "checkpoint-epoch1.pth", {"epoch": 1})
        record = {
            "own_previous": True,
            "previous": content_digest(first / "checkpoint-epoch1.pth"),
            "metrics": json_digest(json.loads((second / "metrics.json").read_text())),
        }
        write_json(second / "made_from.json", record)
        assert "another model" not in report(folder, capsys)
        save_checkpoint(first / "checkpoint-epoch1.pth", {"epoch": 1, "trained": "anew"})
        assert "step 1 was trained from another model of step 0 than is there now" in report(
            folder, capsys
        )
        write_json(second / "made_from.json", {**record, "metrics": "another"})
        assert "damaged, or changed since they were written" in failure(folder, capsys)
