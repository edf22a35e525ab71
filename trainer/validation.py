"""Validation during training: the best model so far, and when to stop early."""

from collections.abc import Iterable

from configs.options import Config
from utils.errors import UserError
from utils.metrics import GROUPS, METRICS


class Validation:
    """Which epochs are validated, the best monitored value, and how long ago that was.

    best: that value, None before the first; stale: validations since then.
    """

    def __init__(self, config: Config):
        """Raises UserError for a monitor of no such name, or early stopping without one."""
        self.settings, self.metrics = config.trainer, config.metrics
        self.best, self.stale = None, 0
        settings = self.settings
        if settings.monitor == "off":
            if settings.early_stop > 0:
                raise UserError("trainer.early_stop needs trainer.monitor, which is off")
            return
        self.mode, self.key = parse_monitor(settings.monitor, config.metrics)
        if settings.validation_period < 1:
            raise UserError(
                "trainer.monitor needs validations: set trainer.validation_period to 1 or more"
            )

    def is_due(self, epoch: int) -> bool:
        """Whether an epoch, counted from 1, is validated."""
        return self.settings.validation_period > 0 and epoch % self.settings.validation_period == 0

    def record(self, metrics: dict) -> tuple[dict[str, float | None], bool]:
        """Take the metrics of a validation (utils.metrics.compute_metrics).

        Returns what goes into the epoch's record, and whether the monitored value is the best so far.
        At step 0 there are no new classes: a monitor of theirs has no value, and stops nothing.
        """
        values = {
            record_key(metric, group): metrics[metric][group]
            for metric in self.metrics
            for group in GROUPS
        }
        if self.settings.monitor == "off":
            return values, False
        value = values.get(self.key)
        if value is None:
            return values, False
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return values, better

    def stops(self) -> bool:
        """Whether the monitored value has not improved for so long that training stops."""
        return 0 < self.settings.early_stop <= self.stale


def parse_monitor(monitor: str, metrics: Iterable[str] = METRICS) -> tuple[str, str]:
    """('max' or 'min', key of the epoch record), from 'max val_<metric>[_<group>]'."""
    mode, _, name = monitor.partition(" ")
    name = name if name.startswith("val_") else f"val_{name}"
    names = {record_key(m, g) for m in metrics for g in GROUPS}
    if mode not in ("max", "min") or name not in names:
        raise UserError(
            f"trainer.monitor is {monitor!r}; allowed: off, or max or min and one of "
            f"{', '.join(metrics)}, with _old, _new or _harmonic"
        )
    return mode, name


def record_key(metric: str, group: str) -> str:
    """Key of the epoch record that holds a validated metric of a group of classes."""
    return f"val_{metric}" if group == "overall" else f"val_{metric}_{group}"
