"""A trainer that is ready to train, of a step of a task."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_loader.data_loaders import StepData, make_loader
from models.deeplabv3 import DeepLabV3
from scripts.make_synthetic_voc import make_synthetic_voc
from trainer.base import Trainer
from trainer.base_step import BaseStep
from trainer.incremental import IncrementalStep
from utils.checkpoint import save_checkpoint
from utils.config import Config


@contextmanager
def prepared_step(args: argparse.Namespace, number: int = 1) -> Iterator[tuple[Trainer, dict]]:
    """Trainer of step `number` of a task on drawn images of 500 px, and a batch of its loader."""
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_root or make_synthetic_voc(Path(folder) / "voc", 8 * args.batch, 1, 400)
        config = Config()
        config.data.data_root, config.trainer.save_dir = str(root), folder
        config.arch.args.backbone, config.arch.args.backbone_pretrained = args.backbone, False
        config.data.train.batch_size, config.data.memory.mem_size = args.batch, args.mem_size
        config.task.name, config.task.step = args.task, number
        config.data.train.args.transform_args.crop_size = args.crop
        config.arch.args.freeze_all_bn = number > 0
        config.amp_dtype = args.amp_dtype
        data = StepData(config)
        if number:
            previous = Path(folder) / "previous.pth"
            model = DeepLabV3(data.classes[:-1], args.backbone)
            content = {"format": "eir-1", "ac": 0.0, "state_dict": model.state_dict()}
            save_checkpoint(previous, content)
            trainer = IncrementalStep(config, data, previous=previous)
        else:
            trainer = BaseStep(config, data)
        raw = next(iter(make_loader(trainer.dataset, trainer.batches, 0, False)))
        yield trainer, raw
