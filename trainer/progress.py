"""Progress within an epoch, on a terminal or as lines."""

import sys
import time

from tqdm import tqdm

from trainer.health import Health
from utils.distributed import rank, world_size
from utils.logging import log


class Progress:
    """Progress within an epoch: a bar on a terminal, else a line every log_interval iterations."""

    def __init__(self, trainer, iterations: int):
        self.trainer, self.iterations = trainer, iterations
        shown = rank() == 0 and trainer.config.trainer.verbosity == 2
        self.lines = shown and not sys.stderr.isatty()
        self.title = f"epoch {trainer.epoch + 1}/{trainer.config.trainer.epochs}"
        self.bar = tqdm(total=iterations, desc=self.title, disable=not shown or self.lines, leave=False)
        self.images, self.started = 0, time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def step(self, iteration: int, images: int, health: Health) -> None:
        self.images += images * world_size()
        self.bar.update()
        last = iteration == self.iterations - 1
        if not last and (iteration + 1) % self.trainer.config.trainer.log_interval:
            return
        loss = health.check(self.trainer.epoch)["loss"]
        lr = self.trainer.scheduler.get_last_lr()[0]
        speed = self.images / (time.perf_counter() - self.started)
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} images/s")
        if self.lines:
            log.info(
                f"{self.title} iteration {iteration + 1}/{self.iterations}: "
                f"loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} images/s"
            )
