"""The log: lines, epoch records, and TensorBoard where it is installed."""

import builtins
import contextlib
import json
import logging
import os

import pytest

from utils.logging import EpochRecords, log, set_up_logging


@pytest.fixture(autouse=True)
def restored_log():
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def test_lines_go_to_standard_output_and_to_the_file(tmp_path, capsys):
    set_up_logging(tmp_path / "log")
    log.info("a line")
    assert capsys.readouterr().out == "a line\n"
    assert (tmp_path / "log" / "log.txt").read_text().endswith("INFO a line\n")


def test_what_was_said_before_there_was_a_file_reaches_it_once(tmp_path, capsys):
    set_up_logging(None)
    log.info("of another run")
    set_up_logging(None)
    log.warning("early")
    for line in ("a line", "another"):
        set_up_logging(tmp_path)
        log.info(line)
    assert capsys.readouterr().out.splitlines() == ["of another run", "early", "a line", "another"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    endings = ("WARNING early", "INFO a line", "INFO another")
    assert all(line.endswith(end) for line, end in zip(lines, endings, strict=True))


def test_an_output_that_nobody_reads_any_more_is_left(tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with (
        monkeypatch.context() as patch,
        contextlib.suppress(BrokenPipeError),
        os.fdopen(writer, "w") as out,
    ):
        patch.setattr("sys.stdout", out)
        set_up_logging(tmp_path)
        for line in ("a line", "another"):
            log.info(line)
    assert capsys.readouterr() == ("", "")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(("verbosity", "main", "shown"), [(0, True, "warned\n"), (2, False, "")])
def test_quiet_runs_and_other_processes(capsys, verbosity, main, shown):
    set_up_logging(None, verbosity, main)
    log.info("a line")
    log.warning("warned")
    assert capsys.readouterr().out == shown


def test_a_resumed_run_writes_later_epochs_again(tmp_path):
    records = EpochRecords(tmp_path)
    records.write({"epoch": 1, "loss": 0.5})
    with open(records.path, "a") as file:
        file.write('damaged\n[]\n{"loss": 1.0}\n')
    for epoch in (2, 3):
        records.write({"epoch": epoch, "loss": 0.5 * epoch})
    with open(records.path, "a") as file:
        file.write('{"epoch": 4, "lo')
    records.keep_until(2)
    records.write({"epoch": 3, "loss": 7.0})
    rows = [json.loads(line) for line in records.path.read_text().splitlines()]
    assert [(row["epoch"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 7.0)]


def test_tensorboard_that_is_not_installed_is_a_warning(tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING):
        records = EpochRecords(tmp_path, tensorboard=True)
    assert "pip install tensorboard" in caplog.text
    records.write({"epoch": 1, "loss": 1.0})


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    records = EpochRecords(tmp_path, tensorboard=True)
    records.write({"epoch": 1, "loss": 1.0})
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.0)]
