"""The meter of an epoch: mean losses, progress, and whether the loss is still finite.

Each iteration leaves its losses on the device. They are read, which waits for the device, every
`interval` iterations, when progress is shown. Where batch normalisation is frozen (`--freeze_bn`), an
iteration waits nowhere else; PyTorch's synchronised batch normalisation does. A loss that is not finite
raises a flag on the device, which keeps the optimiser from stepping at once (as the loss scaler does by
itself, where there is one), and ends the run when it is read.
"""

import sys
import time

import torch
from tqdm import tqdm

from utils.distributed import all_max, all_sum, gather, rank, world_size
from utils.errors import UserError
from utils.logging import log


class Meter:
    """Follows one epoch; a context manager, since a progress bar has to be closed."""

    def __init__(
        self,
        title: str,
        iterations: int,
        device: torch.device,
        interval: int = 10,
        shown: bool = True,
    ):
        """title: of the epoch, for progress and errors; iterations: how many the epoch has.

        interval: iterations between two looks at the loss. shown: show progress, as a bar on a
        terminal, else as lines of the log; only the first process does.
        """
        self.title, self.iterations, self.interval = title, iterations, interval
        self.iteration, self.images, self.started = 0, 0, time.perf_counter()
        self.failed = torch.zeros((), dtype=torch.float32, device=device)
        self.sums: dict[str, torch.Tensor] = {}
        self.recent: list[tuple[dict[str, torch.Tensor], list[str]]] = []
        shown = shown and rank() == 0
        self.lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(total=iterations, desc=title, disable=not shown or self.lines, leave=False)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def record(self, losses: dict[str, torch.Tensor], images: list[str]) -> torch.Tensor:
        """Take the losses of an iteration, by name, of this process's images (ids).

        Returns a flag on the device, 1.0 from the first iteration on in which a loss of any process
        was not finite, else 0.0.
        """
        values = torch.stack(list(losses.values()))
        self.failed = torch.maximum(self.failed, all_max((~values.isfinite().all()).float()))
        self.recent.append((losses, images))
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.iteration += 1
        self.images += len(images) * world_size()
        return self.failed

    def show(self, lr: float) -> None:
        """After an iteration: when it is time, read the loss and show it, learning rate and speed.

        Raises UserError if the loss was not finite.
        """
        self.bar.update()
        if self.iteration % self.interval and self.iteration != self.iterations:
            return
        loss = sum(self.read().values())
        speed = self.images / (time.perf_counter() - self.started)
        text = f"loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} images/s"
        self.bar.set_postfix_str(text)
        if self.lines:
            log.info(f"{self.title} iteration {self.iteration}/{self.iterations}: {text}")

    def read(self) -> dict[str, float]:
        """Mean losses over the iterations since the last reading; UserError if one is not finite."""
        names = list(self.recent[0][0])
        rows = torch.stack([torch.stack(list(losses.values())) for losses, _ in self.recent])
        means = all_sum(rows.to(torch.float64, copy=True)).mean(dim=0).tolist()
        if self.failed.item():
            self._give_up(rows.tolist())
        self.recent.clear()
        return dict(zip(names, means, strict=True))

    def means(self) -> dict[str, float]:
        """Mean losses of the epoch over all processes by name, after their sum as "loss"."""
        totals = all_sum(torch.stack(list(self.sums.values()))) / self.iteration
        means = dict(zip(self.sums, totals.tolist(), strict=True))
        return {"loss": sum(means.values()), **means}

    def _give_up(self, rows):
        """End the run, naming the first iteration that failed, in whichever process it was."""
        first = self.iteration - len(rows) + 1
        failures = []
        for i, row in enumerate(rows):
            if not all(abs(value) < float("inf") for value in row):
                losses, images = self.recent[i]
                values = ", ".join(f"{n} {v}" for n, v in zip(losses, row, strict=True))
                failures.append((first + i, values, ", ".join(images)))
        iteration, values, images = min(f for process in gather(failures) for f in process)
        raise UserError(
            f"the loss is not finite in {self.title}, iteration {iteration} ({values}), images "
            f"{images}: no weight was touched by it and the last checkpoint stands; a smaller --lr or "
            "use_amp false may help"
        )
