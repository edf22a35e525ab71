"""The help of every entry point, and what each says to flags that it does not have."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest

from configs.options import read_eval, read_train
from tests.helpers import PROJECT, code_of, error_line, run_script
from utils.config import Parser

ENTRY_POINTS = [
    path.relative_to(PROJECT).as_posix()
    for path in sorted([*PROJECT.glob("*.py"), *PROJECT.glob("scripts/*.py")])
    if 'if __name__ == "__main__":' in path.read_text()
]
SCRIPTS = [name for name in ENTRY_POINTS if name.startswith("scripts/")]


TRAINING_FLAGS = ("scripts/preview_replay.py", "scripts/show_splits.py")  # those of train_voc.py too


class Parsed(Exception):
    """Raised in place of what a script does with its flags."""


@pytest.fixture
def parse(monkeypatch):
    """Let a script read a command line, and nothing else."""
    read = Parser.parse_known_args

    def stop(self, *arguments):
        raise Parsed(read(self, *arguments)[1])

    def call(script, arguments):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr("sys.argv", [script, *arguments])
            patch.setattr(Parser, "parse_known_args", stop)
            module.main()
        return parsed.value.args[0]

    return call


def examples(text, script):
    """The arguments of each example in a help."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.strip().startswith(f"python {script} ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_help_has_examples_of_flags_that_it_knows(script, parse):
    help_of_it = importlib.import_module(script.removesuffix(".py").replace("/", ".")).__doc__
    found = examples(help_of_it, script)
    assert found
    for arguments in found:
        rest = parse(script, arguments)
        if script in TRAINING_FLAGS:
            read_train([word for word in rest if word != "-c" and not word.endswith(".json")])
        else:
            assert not rest


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_help_of_each_entry_point(script):
    result = run_script(script, "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {script.split('/')[-1]} ")
    found = examples(result.stdout, script)
    assert found
    if script.startswith("train"):
        assert [read_train(arguments)[0].task.step for arguments in found] == [0, 1]
    if script.startswith("eval"):
        assert [flag for flag, _ in found] == ["-r"]
        with pytest.raises(Exception, match="no checkpoint at"):
            read_eval(found[0])


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_without_the_packages_each_says_how_to_get_them(script):
    command = [sys.executable, "-S", script, "--help"]  # -S: without those that are installed
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    line = error_line(result)
    assert "lacks the package " in line and "pip install -r requirements.txt" in line


@pytest.mark.parametrize("script", sorted({*ENTRY_POINTS} - {*SCRIPTS}))
def test_wrong_use_of_a_program(script):
    needed = ("-r", "x.pth", "-c", "configs/config_voc.json") if script.startswith("eval") else ()
    line = error_line(run_script(script, *needed, "--no_such_flag"))
    assert line.endswith(f"({script} --help lists the flags)")


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_use_of_a_script(script, monkeypatch, capsys):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr("sys.argv", [script, "--no_such_flag"])
    assert code_of(module.main) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.endswith(f"({script.split('/')[-1]} --help lists the flags)\n")


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "train_voc.sh"])
def test_help_of_the_shell_scripts(script):
    result = subprocess.run(
        ["bash", f"scripts/{script}", "--help"], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    assert re.search(rf"^ +bash scripts/{script}", result.stdout, re.MULTILINE)
    assert "#" not in result.stdout and "set -e" not in result.stdout


@pytest.mark.parametrize("script", ["demo.sh", "train_voc.sh"])
def test_wrong_use_of_the_shell_scripts(script):
    result = subprocess.run(
        ["bash", f"scripts/{script}", "wrong"], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
