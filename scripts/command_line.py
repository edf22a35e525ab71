"""The command line of the scripts."""

from typing import NoReturn

from utils import config
from utils.errors import UserError, exit_with


class Parser(config.Parser):
    """A command line whose help is a docstring, and whose errors end the process in one line."""

    def __init__(self, docstring: str, **settings):
        super().__init__(None, docstring, **settings)

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except UserError as error:
            exit_with(error)
