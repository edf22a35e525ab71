"""Progress within an epoch, on a terminal or as lines."""

import sys
import time

from tqdm import tqdm

from utils.distributed import rank, world_size
from utils.logging import log


class Progress:
    """A bar on a terminal, else a line for each `show`; nothing in other processes than the first."""

    def __init__(self, title: str, iterations: int, shown: bool = True):
        self.title, self.iterations = title, iterations
        shown = shown and rank() == 0
        self.lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(total=iterations, desc=title, disable=not shown or self.lines, leave=False)
        self.images, self.started = 0, time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def advance(self, images: int) -> None:
        """An iteration with so many images in each process is over."""
        self.images += images * world_size()
        self.bar.update()

    def show(self, iteration: int, loss: float, lr: float) -> None:
        """Show loss, learning rate and images per second since the start."""
        speed = self.images / (time.perf_counter() - self.started)
        text = f"loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} images/s"
        self.bar.set_postfix_str(text)
        if self.lines:
            log.info(f"{self.title} iteration {iteration}/{self.iterations}: {text}")
