"""The log: lines on standard output and in a file, a record per epoch, TensorBoard on request."""

import json
import logging
import logging.handlers
import math
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from tqdm import tqdm

from utils.checkpoint import cannot_write, write_atomically
from utils.errors import UserError

log = logging.getLogger("eir")


def set_up_logging(folder: Path | None, verbosity: int = 2, main_process: bool = True) -> None:
    """Log to standard output and to folder/log.txt; other processes than the first say nothing.

    verbosity 0: warnings only, 1 and 2: everything (2 has progress within an epoch as well). What was
    said since a call without a folder is written there too.
    """
    kept = [
        r for h in log.handlers if isinstance(h, logging.handlers.BufferingHandler) for r in h.buffer
    ]
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.WARNING if verbosity == 0 else logging.INFO)
    if not main_process:
        log.setLevel(logging.CRITICAL)
        return
    handlers = [_Output(sys.stdout), logging.handlers.BufferingHandler(1000)]
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handlers[1] = _LogFile(folder / "log.txt", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the log in {folder}: {error.strerror}") from None
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in kept:
            handlers[1].handle(record)
    for handler in handlers:
        log.addHandler(handler)


class _Output(logging.StreamHandler):
    """Standard output; where nobody reads it any more (`| head`), the log goes on in the file alone."""

    def handleError(self, record):
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            self.setLevel(logging.CRITICAL + 1)  # says nothing more
        else:
            super().handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that cannot be written ends the run in one line, where Python prints a traceback."""

    def handleError(self, record):
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise cannot_write(Path(self.baseFilename), error) from None
        super().handleError(record)


def progress(items: Collection, title: str, unit: str = "it", every: float = 30) -> Iterator:
    """The items, with a bar in a terminal; elsewhere with a line in the log every so many seconds.

    Where the log is to show no information (verbosity 0, all processes but the first) there is neither.
    """
    if log.level > logging.INFO:
        yield from items
        return
    bar = tqdm(items, desc=title, unit=unit, disable=None, leave=False)
    if not bar.disable:
        yield from bar
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= every and done < len(items):
            left = (now - started) / done * (len(items) - done)
            log.info(f"{title}: {done} of {len(items)}, about {left:.0f} s to go")
            said = now


class EpochRecords:
    """One JSON line per epoch in metrics.jsonl, and the same scalars to TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.writer = _tensorboard_writer(folder) if tensorboard else None

    def keep_until(self, epoch: int) -> None:
        """Drop the lines after `epoch`, which a resumed run writes again, and damaged ones."""
        if self.path.is_file():
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and _epoch_of(line) <= epoch]
            write_atomically(self.path, lambda file: file.writelines(kept))

    def write(self, record: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from None
        if self.writer:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.writer.add_scalar(name, value, record["epoch"])
            self.writer.flush()


def _epoch_of(line):
    """Epoch of a record; infinity for a line that is none."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf


def _tensorboard_writer(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning(
            "trainer.tensorboard is on but tensorboard is not installed: pip install tensorboard"
        )
        return None
    return SummaryWriter(folder)
