"""To be imported first by a program: from then on, whatever ends it is one line on standard error.

Also Ctrl-C while PyTorch is imported, which takes seconds, and what a script lets pass.
"""

import argparse
import sys
from pathlib import Path

from utils.config import no_path
from utils.errors import exit_with, explained, unexpected


def _one_line(kind, error, trace):
    """What Python calls with an exception that nobody caught (sys.excepthook)."""
    try:
        raise error.with_traceback(trace)
    except BaseException:
        line = explained(error) or unexpected()
    exit_with(line)


def a_path(text: str) -> Path:
    """A path on a script's command line, as the `type` of argparse; ~ is the home folder."""
    if complaint := no_path(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no path: {complaint}")
    return Path(text).expanduser()


sys.excepthook = _one_line
