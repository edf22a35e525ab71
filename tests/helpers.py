"""What several test files share: a small configuration, and entry points run as a user runs them."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import utils.program  # noqa: F401

from configs.options import VOC_CLASSES, Config
from utils.config import get, options, put
from utils.errors import UserError

CLASS_NAMES = ("background", *VOC_CLASSES)
PROJECT = Path(__file__).resolve().parents[1]

SMALL = {
    "backbone": "tiny",
    "backbone_weights": "none",
    "task_name": "5-3",
    "task_step": 0,
    "crop_size": 64,
    "epochs": 2,
    "bs": 4,
    "lr": 0.01,
    "num_workers": 0,
}


def small_config(root: Path, save_dir: Path, **changes) -> Config:
    """A configuration that trains in seconds on the CPU.

    changes: by the name of a flag (bs=2) or by the option's path (trainer__save_period=1).
    """
    config = Config()
    for name, value in {"data_root": str(root), "save_dir": str(save_dir), **SMALL, **changes}.items():
        by_flag = [o.path for o in options(Config) if f"--{name}" in o.metadata["flags"]]
        for path in by_flag or [name.replace("__", ".")]:
            get(config, path)  # fails where there is no such option
            put(config, path, value)
    return config


def train_flags(root: Path, save_dir: Path, **changes) -> list[str]:
    """Flags of train_voc.py for a run that takes seconds on the CPU."""
    flags = {"data_root": root, "save_dir": save_dir, **SMALL, **changes}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_script(*arguments, **environment: str) -> subprocess.CompletedProcess:
    """Run python with these arguments in the project's folder, on one core and no GPU."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def code_of(program: Callable[[], int | None]) -> int:
    """The exit code of a program that is called in this process; what a user can do something about is
    shown by utils/program.py, as when it runs by itself, and other exceptions pass."""
    try:
        try:
            return program() or 0
        except (UserError, OSError):
            sys.excepthook(*sys.exc_info())
    except SystemExit as end:
        return end.code or 0
    raise AssertionError("utils/program.py has not ended the program")


def error_line(result: subprocess.CompletedProcess | SimpleNamespace) -> str:
    """The one error line of a command that was refused."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return lines[0]


def snapshot(folder: Path) -> dict[str, str]:
    """Contents of a folder: relative path -> checksum."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
