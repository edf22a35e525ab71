"""The monitored value: which one the best model and early stopping go by."""

from collections.abc import Iterable

from utils.config import GROUPS, METRICS, Config
from utils.errors import UserError


def parse_monitor(monitor: str, metrics: Iterable[str] = METRICS) -> tuple[str, str]:
    """('max' or 'min', key of the epoch record), from 'max val_<metric>[_<group>]'."""
    mode, _, name = monitor.partition(" ")
    name = name if name.startswith("val_") else f"val_{name}"
    names = {monitor_name(m, g) for m in metrics for g in GROUPS}
    if mode not in ("max", "min") or name not in names:
        raise UserError(
            f"trainer.monitor is {monitor!r}; allowed: off, or max or min and one of "
            f"{', '.join(metrics)}, with _old, _new or _harmonic"
        )
    return mode, name


def check_monitor(config: Config) -> None:
    """Raise UserError for a monitor that could never be read, or early stopping without one."""
    settings = config.trainer
    if settings.monitor == "off":
        if settings.early_stop > 0:
            raise UserError("trainer.early_stop needs trainer.monitor, which is off")
        return
    parse_monitor(settings.monitor, config.metrics)
    if settings.validation_period < 1:
        raise UserError("trainer.monitor needs validations: set trainer.validation_period to 1 or more")


def monitor_name(metric: str, group: str) -> str:
    """Key of the epoch record that holds a validated metric of a group of classes."""
    return f"val_{metric}" if group == "overall" else f"val_{metric}_{group}"
