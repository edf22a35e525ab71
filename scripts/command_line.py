"""The command line of the scripts."""

import argparse
from typing import NoReturn

from utils.errors import UserError, exit_with


class Parser(argparse.ArgumentParser):
    """A command line whose help is a module's docstring as it stands, with its examples, and whose
    errors are one line and exit code 2. Flags are never abbreviated."""

    def __init__(self, docstring: str, **settings):
        super().__init__(
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        exit_with(UserError(f"{message} ({self.prog} --help lists the flags)"))

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse; what its own code trips over (such as `--seed --`) is an error line too."""
        try:
            return super().parse_known_args(args, namespace)
        except IndexError:
            self.error("a flag lacks its value")
