"""The one exception that stands for "the user can fix this", and its way to the terminal."""

import os
import sys
import time
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the way out.

    DataLoader workers re-raise an exception with their traceback as its text; ``str`` gives the
    original line back.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition("UserError: ")[2].strip()


def exit_with(error: UserError, rank: int | None = None) -> NoReturn:
    """Print the error as one line on standard error and end this process with exit code 2.

    rank: of this process, by default what torchrun says. Where all processes meet the same error, only
    the first should print it. So the others wait: when the first one ends, the launcher (torchrun or
    mp.spawn) ends them too. If it does not, the error was theirs alone, and they print it.
    """
    if int(os.environ.get("RANK", 0)) if rank is None else rank:
        time.sleep(5)
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
