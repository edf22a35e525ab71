"""Every exception that reaches the end of a command is one line."""

import re
from pathlib import Path

import pytest
import torch

from configs.options import Config
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
