"""The exception that stands for "the user can fix this", what becomes one, and how it is shown."""

import os
import re
import signal
import sys
import tempfile
import time
import traceback
from typing import NoReturn

# What the libraries say when memory runs out, in a loader's process as well, whose exceptions may
# arrive as text in a RuntimeError.
NO_MEMORY = r"out of memory|ALLOC_FAILED|(can't|cannot|unable to) allocate|bad[_ ]alloc|MemoryError"
OWN = ("configs", "data_loader", "models", "scripts", "trainer", "utils")  # packages that are here
LONGEST = 1200  # characters of an error line


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the way out.

    DataLoader workers re-raise an exception with their traceback as its text; ``str`` gives the
    original line back. Names that the message quotes may hold line ends, or be of any length; it stays
    one line that can be read: of a very long one the middle is left out.
    """

    def __str__(self) -> str:
        text = super().__str__().rpartition("UserError: ")[2].strip()
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


def explained(error: BaseException) -> UserError | None:
    """A UserError for an exception that has a cause outside the program; None for any other."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return UserError(
            "interrupted: run the same command again; a training goes on after its last finished epoch "
            "where --resume auto is among the flags"
        )
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing and missing not in OWN:
        return UserError(
            f"{sys.executable} lacks the package {missing}: source .venv/bin/activate first, or "
            "pip install -r requirements.txt"
        )
    if type(error).__name__ == "DistBackendError":  # of torch.distributed; its lines all say something
        return UserError(f"the processes cannot be connected: {' '.join(str(error).split())}")
    if "received 0 items of ancdata" in text or "Too many open files" in text:
        return UserError(
            "too many open files: raise the limit (ulimit -n 65536), or use fewer --num_workers"
        )
    if "shared memory" in text or "Bus error" in text or re.search(r"/torch_\d+_", text):
        return UserError(
            "the loader's processes have too little shared memory (/dev/shm): start the container "
            "with more of it (docker run --shm-size 8g), or use --num_workers 0"
        )
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, text, re.IGNORECASE):
        on_gpu = re.search("cuda|cudnn|cublas", text, re.IGNORECASE)
        where = "the GPU's memory" if on_gpu else "the memory"
        return UserError(
            f"{where} is used up: use a smaller --bs, or a larger --accumulate (the same batch in more "
            "pieces), or a smaller --crop_size; in an evaluation, a smaller batch_size of val and test "
            "in the configuration; the last checkpoint stands"
        )
    if re.search(r"DataLoader worker.*(exited unexpectedly|killed by signal)", text):
        first = str(error).strip().splitlines()[0]
        return UserError(
            f"a loader process died ({first}): often the system ended it for lack of memory; use fewer "
            "--num_workers, and --resume auto to go on"
        )
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return UserError(f"the operating system refused: {name}{error.strerror or error}")
    return None


def unexpected() -> UserError:
    """The error for an exception that nobody foresaw; its traceback is written to a file."""
    last = traceback.format_exc().strip().splitlines()[-1]
    try:
        handle, path = tempfile.mkstemp(prefix="eir_error_", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
        details = f"details in {path}"
    except OSError as error:
        details = f"its details could not be written: {error.strerror}"
    return UserError(f"a fault of this program, please report it: {last} ({details})")


def exit_with(error: UserError, rank: int | None = None) -> NoReturn:
    """Print the error as one line on standard error and end this process with exit code 2.

    rank: of this process, by default what torchrun says. Where all processes meet the same error, only
    the first should print it. So the others wait: when the first one ends, the launcher (torchrun or
    mp.spawn) ends them too. If it does not, the error was theirs alone, and they print it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's SIGTERM ends the waiting quietly
    if os.environ.get("RANK", "0") != "0" if rank is None else rank:
        time.sleep(5)
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
