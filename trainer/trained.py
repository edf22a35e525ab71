"""A trained network by itself, without the data that it was trained on."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from utils.program import a_path

from configs.options import Config, read_eval
from data_loader.tasks import Task, check_step, task_of
from models.deeplabv3 import DeepLabV3
from trainer.output import make_model
from utils.checkpoint import read_checkpoint
from utils.distributed import device
from utils.errors import UserError


@dataclass
class Trained:
    """A network in evaluation mode on this process's device, and what its channels stand for.

    origin: the keys of its checkpoint that tell whether cls.0 is DKD's auxiliary classifier.
    """

    path: Path
    model: DeepLabV3
    config: Config
    task: Task
    step: int
    origin: dict

    @property
    def ids(self) -> list[int]:
        """By channel, the id in the label maps of the data set; the background has 0."""
        return [0, *self.task.seen(self.step)]

    @property
    def names(self) -> list[str]:
        """By channel, the name of its class, background first."""
        return self.task.class_names(self.step)


def titles(models: list[Trained]) -> list[str]:
    """What a picture calls each model: its step, and the run's name where another has the same."""
    steps = [model.step for model in models]
    return [
        f"{model.config.name}, step {model.step}"
        if steps.count(model.step) > 1
        else f"step {model.step}"
        for model in models
    ]


def add_flags(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Give a parser the flags that say what to read: one checkpoint, or several with nargs "+"."""
    parser.add_argument(
        "-r",
        "--resume",
        nargs=nargs,
        type=a_path,
        required=True,
        metavar="CKPT",
        help="checkpoint of a step",
    )
    of_it = "(that of the configuration)"
    parser.add_argument("-c", "--config", help="JSON configuration (config.json beside the checkpoint)")
    parser.add_argument("--task_name", help=f"task {of_it}")
    parser.add_argument("--task_step", type=int, help="step (by the classifiers in the checkpoint)")
    parser.add_argument("--backbone", help=f"feature network {of_it}")


def read_steps(paths: list[Path], args: argparse.Namespace) -> list[Trained]:
    """The networks in several checkpoints, by their steps; UserError unless these are of one task."""
    models = sorted((read_trained(path, args) for path in paths), key=lambda model: model.step)
    last = models[-1]
    for model in models:
        if model.ids != last.ids[: len(model.ids)]:
            raise UserError(
                f"{model.path} and {last.path} are no steps of one task: their classes differ"
            )
    return models


def read_trained(path: Path, args: argparse.Namespace) -> Trained:
    """The network in a checkpoint of this project or of the family; args: of the flags above.

    Raises UserError as eval_voc.py does where the file or what was said about it is wrong.
    """
    said = {name: getattr(args, name) for name in ("config", "task_name", "task_step", "backbone")}
    flags = [f"--{name}={value}" for name, value in said.items() if value is not None]
    config, _ = read_eval(["-r", str(path), *flags])
    task = task_of(config.data)
    content = read_checkpoint(path)
    step = config.task.step
    if args.task_step is None:  # cls.0 is the background, cls.1 of step 0
        classifiers = [key for key in content["state_dict"] if re.fullmatch(r"cls\.\d+\.weight", key)]
        step = max(len(classifiers) - 2, 0)
    check_step(task, step)
    model = make_model(content, path, task, config.arch.args.backbone, step)
    origin = {key: content[key] for key in ("format", "ac") if key in content}
    return Trained(path, model.to(device()).eval(), config, task, step, origin)
