"""Watching the loss without waiting for the device.

Each iteration leaves its loss parts on the device. A loss that is not finite raises a flag there,
which gates the optimiser at once; the flag is read when a line is logged, and ends the run.
"""

import torch

from utils.distributed import all_max, all_sum, gather
from utils.errors import UserError


class Health:
    """Loss parts of an epoch, and the flag of a loss that was not finite."""

    def __init__(self, names: tuple[str, ...], device: torch.device, step: int = 0):
        self.names, self.step = names, step
        self.failed = torch.zeros((), dtype=torch.float32, device=device)
        self.recent: list[tuple[torch.Tensor, list[str]]] = []
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self.iterations = 0

    def record(self, parts: torch.Tensor, images: list[str]) -> torch.Tensor:
        """Add an iteration's parts [P] and image ids; returns the flag, 1.0 from a failure on."""
        failed = all_max((~parts.isfinite().all()).float())
        self.failed = torch.maximum(self.failed, failed)
        self.recent.append((parts, images))
        self.sums += parts
        self.iterations += 1
        return self.failed

    def check(self, epoch: int) -> dict[str, float]:
        """Mean parts, and their sum as loss, since the last check; UserError if the flag is up."""
        parts = torch.stack([parts for parts, _ in self.recent])
        values = all_sum(parts.double()).tolist()
        if self.failed.item():
            self._give_up(epoch, parts.tolist())
        self.recent.clear()
        return self._named([sum(column) / len(values) for column in zip(*values, strict=True)])

    def epoch_means(self) -> dict[str, float]:
        """Mean parts of the epoch over all processes, and their sum as loss."""
        return self._named((all_sum(self.sums.clone()) / self.iterations).tolist())

    def _named(self, values):
        return {"loss": sum(values), **dict(zip(self.names, values, strict=True))}

    def _give_up(self, epoch, rows):
        """End the run, naming the first iteration that failed, in whichever process it was."""
        first = self.iterations - len(rows) + 1
        failures = []
        for i, row in enumerate(rows):
            if not all(abs(value) < float("inf") for value in row):
                parts = ", ".join(f"{n} {v}" for n, v in zip(self.names, row, strict=True))
                failures.append((first + i, parts, ", ".join(self.recent[i][1])))
        iteration, parts, images = min(f for process in gather(failures) for f in process)
        raise UserError(
            f"the loss is not finite in step {self.step}, epoch {epoch + 1}, iteration {iteration} "
            f"({parts}), images "
            f"{images}: no weight or checkpoint was touched by it; a smaller --lr or use_amp false "
            "may help"
        )
