"""Fixtures of the trainer's tests."""

import logging
from collections.abc import Iterator

import pytest
import torch

from utils.logging import log


@pytest.fixture
def float64() -> Iterator[None]:
    """Models and numbers in float64, for comparisons with a formula."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def module_cpu() -> Iterator[None]:
    """As the fixture `cpu`, for what a module trains once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The texts of the warnings that are logged while the test runs."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    handler = Keep()
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)
