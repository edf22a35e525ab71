"""Progress of long loops: a bar in a terminal, lines in a log, nothing where nothing is asked for."""

import logging

import pytest

from utils.logging import log, progress, set_up_logging


@pytest.fixture(autouse=True)
def as_before():
    level = log.level
    yield
    log.handlers.clear()
    log.setLevel(level)


def test_without_a_terminal_it_says_how_far_it_is(capsys):
    set_up_logging(None)
    assert list(progress([1, 2, 3], "index", every=0)) == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == ["index: 1 of 3", "index: 2 of 3"]


def test_lines_are_sparse(capsys):
    set_up_logging(None)
    assert len(list(progress(range(1000), "index"))) == 1000
    assert capsys.readouterr().out == ""


def test_in_a_terminal_it_shows_a_bar(capsys, monkeypatch):
    set_up_logging(None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress([1, 2], "index")) == [1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "index:" in err


@pytest.mark.parametrize(("verbosity", "first"), [(0, True), (2, False)])
def test_nothing_where_the_log_is_silent(capsys, monkeypatch, verbosity, first):
    set_up_logging(None, verbosity, first)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress([1, 2], "index", every=0)) == [1, 2]
    assert capsys.readouterr() == ("", "")
    assert log.level > logging.INFO
