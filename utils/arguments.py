"""The command lines of train_voc.py and eval_voc.py."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.config import Config
from utils.config_file import load_config
from utils.errors import UserError, exit_with
from utils.flags import add_config_flags, apply_flags

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "config_voc.json"


@dataclass
class Run:
    """What one call asks for, beside the configuration of the experiment."""

    ignored: list[str]
    resume: str | None = None
    overwrite: bool = False
    test: bool = False
    prev_checkpoint: str | None = None
    output: str | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def _parser(program: str, description: str) -> _Parser:
    parser = _Parser(program, description=description, allow_abbrev=False)
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help=f"JSON configuration (default: {DEFAULT_CONFIG.name})",
    )
    parser.add_argument(
        "-d",
        "--device",
        metavar="GPUS",
        help="GPU indices such as 0,1; a CUDA_VISIBLE_DEVICES that is already set wins",
    )
    return parser


def _find(flags: tuple[str, ...], arguments: list[str]) -> str | None:
    """Value of a flag, before the parser that needs it exists."""
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument(*flags, dest="value")
    return finder.parse_known_args(arguments)[0].value


def select_devices(device: str | None) -> None:
    """Let this process see the GPUs of ``-d``, unless CUDA_VISIBLE_DEVICES is set already."""
    if device is None:
        return
    if not all(part.strip().isdigit() for part in device.split(",")):
        raise UserError(f"-d is {device!r}; give GPU indices such as 0 or 0,1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", device)


def parse_train(arguments: list[str] | None = None) -> tuple[Config, Run]:
    """Configuration and request of a call of train_voc.py; bad input ends the process."""
    try:
        return read_train(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        exit_with(error)


def read_train(arguments: list[str]) -> tuple[Config, Run]:
    """The same, but bad input raises UserError."""
    config, ignored = load_config(_find(("-c", "--config"), arguments) or DEFAULT_CONFIG)
    parser = _parser("train_voc.py", "Train one step of a continual task, then evaluate it.")
    parser.add_argument(
        "-r",
        "--resume",
        metavar="PATH",
        help="go on from this checkpoint; 'auto': from the step's last one, if there is one",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="train the step anew, replacing its output"
    )
    parser.add_argument("--test", action="store_true", help="evaluate only")
    parser.add_argument(
        "--prev_checkpoint",
        metavar="FILE",
        help="start step t >= 1 from this model instead of step t-1's own output",
    )
    add_config_flags(parser, config)
    parsed = parser.parse_args(arguments)
    apply_flags(config, parsed)
    select_devices(parsed.device)
    if parsed.overwrite and parsed.resume:
        raise UserError("--overwrite and --resume exclude each other: give one of them")
    if config.hyperparameter.ignore_thresh is not None and not config.hyperparameter.pseudo_labels:
        raise UserError("--ignore_thresh needs pseudo labels: drop it, or --pseudo_labels off")
    return config, Run(ignored, parsed.resume, parsed.overwrite, parsed.test, parsed.prev_checkpoint)


def parse_eval(arguments: list[str] | None = None) -> tuple[Config, Run]:
    """Configuration and request of a call of eval_voc.py; bad input ends the process."""
    try:
        return _parse_eval(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        exit_with(error)


def _parse_eval(arguments):
    checkpoint = _find(("-r", "--resume"), arguments)
    given = _find(("-c", "--config"), arguments)
    beside = Path(checkpoint).parent / "config.json" if checkpoint else DEFAULT_CONFIG
    wants_help = {"-h", "--help"} & set(arguments)
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(f"no checkpoint at {checkpoint}: give the path of a .pth file with -r")
    if not given and not beside.is_file():
        raise UserError(f"no config.json beside {checkpoint}: give the configuration with -c")
    config, ignored = load_config(given or beside)
    parser = _parser("eval_voc.py", "Evaluate a checkpoint on the test images of its step.")
    parser.add_argument(
        "-r", "--resume", metavar="PATH", required=not wants_help, help="checkpoint to evaluate"
    )
    if not given:  # how the training was started is not how this is
        config.rank, config.world_size, config.dist_url = 0, 1, None
    parser.add_argument("--test", action="store_true", help="accepted; evaluation is all this does")
    parser.add_argument("--output", metavar="FILE", help="write the numbers to this JSON file")
    add_config_flags(parser, config)
    parsed = parser.parse_args(arguments)
    apply_flags(config, parsed)
    select_devices(parsed.device)
    return config, Run(ignored, resume=parsed.resume, test=True, output=parsed.output)
