"""To be imported first by a program: from then on, whatever ends it is one line on standard error.

Also Ctrl-C while PyTorch is imported, which takes seconds, and what a script lets pass.
"""

import sys

from utils.errors import exit_with, explained, unexpected


def _one_line(kind, error, trace):
    """What Python calls with an exception that nobody caught (sys.excepthook)."""
    try:
        raise error.with_traceback(trace)
    except BaseException:
        line = explained(error) or unexpected()
    exit_with(line)


sys.excepthook = _one_line
