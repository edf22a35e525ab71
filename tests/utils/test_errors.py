"""Every exception that reaches the end of a command is one line."""

import re
from pathlib import Path

import pytest
import torch

from configs.options import Config
from tests.helpers import error_line, run_script
from utils.distributed import launch
from utils.errors import UserError, explained


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("a\nb"), r"a\\nb"),
        (
            UserError("Caught UserError in worker\n  line\nUserError: itself\n"),
            "^itself$",
        ),
        (KeyboardInterrupt(), "interrupted: .*--resume auto"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory"),
            "the GPU's memory is used up",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "the memory is used",
        ),
        (MemoryError(), "the memory is used up"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU's memory is"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory is used up"),
        (RuntimeError("std::bad_alloc"), "the memory is used up"),
        (
            RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0.\nOriginal ..."),
            "the memory is used up",
        ),
        (
            RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device"
            ),
            "too little shared memory",
        ),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("unable to open shared memory object </torch_1_2>"), "--shm-size 8g"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal"),
            "a loader process died",
        ),
        (PermissionError(13, "Permission denied", "x.txt"), "refused: x.txt: Permission denied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_user_can_do_something_about_says_what(error, words):
    assert re.search(words, str(explained(error))) and "\n" not in str(explained(error))


def test_a_package_is_missing_but_a_module_of_ours_is_a_fault():
    missing = explained(ModuleNotFoundError("No module named 'timm.data'", name="timm.data"))
    assert "lacks the package timm: " in str(missing)
    for error in (ModuleNotFoundError("x", name="trainer.gone"), ModuleNotFoundError("no name")):
        assert explained(error) is None


def test_a_fault_of_the_program_leaves_its_traceback_in_a_file(cpu, capsys):
    def fail(config):
        raise KeyError("unforeseen")

    assert explained(KeyError()) is None
    assert explained(RuntimeError("Caught KeyError in DataLoader worker process 0.")) is None
    with pytest.raises(SystemExit) as ended:
        launch(fail, Config())
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert ended.value.code == 2 and "please report it: KeyError: 'unforeseen'" in line
    file = Path(re.search(r"details in (\S+)\)", line)[1])
    assert 'raise KeyError("unforeseen")' in file.read_text()
    file.unlink()


def test_of_a_very_long_line_the_middle_is_left_out():
    text = str(UserError(f"no file {'a' * 5000}: give another one"))
    assert len(text) < 1300 and text.startswith("no file aaa") and text.endswith("a: give another one")


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("raise KeyboardInterrupt", "error: interrupted: run the same command again"),
        ("open('no/such\\nfile')", "error: the operating system refused: no/such\\nfile: No such file"),
        ("raise MemoryError", "error: the memory is used up"),
        ("{}['unforeseen']", "error: a fault of this program, please report it: KeyError"),
    ],
)
def test_what_ends_a_program_before_it_starts_to_work_is_one_line(statement, words):
    """Without PyTorch, which utils.program does not import: Ctrl-C counts from there on."""
    program = f"import sys, utils.program; assert 'torch' not in sys.modules; {statement}"
    result = run_script("-c", program)
    line = error_line(result)
    assert line.startswith(words) and result.stdout == ""
    if "details in" in line:
        Path(re.search(r"details in (\S+)\)", line)[1]).unlink()
