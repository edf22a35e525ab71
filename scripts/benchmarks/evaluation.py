"""The evaluation loop."""

import argparse

import torch

from data_loader.data_loaders import EvalBatches, StepData, make_loader
from data_loader.dataset import normalize
from models.deeplabv3 import DeepLabV3
from scripts.benchmarks.data import data_root
from scripts.benchmarks.timing import Row, compare
from trainer.evaluate import confusion_matrix
from utils.config import Config
from utils.distributed import device


def evaluation(args: argparse.Namespace) -> list[Row]:
    """The evaluation loop, data included, beside the bare forward passes of the same images."""
    with data_root(args, args.eval_images) as root:
        data = _evaluation_data(args, root)
        where = device()
        model = DeepLabV3(data.classes, args.backbone).to(where, memory_format=torch.channels_last)
        model.eval()
        dataset, batch_size = data.evaluation("test")
        batches = EvalBatches(len(dataset), batch_size)
        images = [normalize(b["image"].to(where)) for b in make_loader(dataset, batches, 0, False)]

        @torch.inference_mode()
        def forward():
            with torch.backends.cudnn.flags(
                enabled=True, deterministic=True, benchmark=False, allow_tf32=False
            ):
                for batch in images:
                    model(batch)

        def loop():
            confusion_matrix(model, data, "test", where)

        title = f"{args.backbone}, crop {args.eval_crop}, per image"
        n = len(dataset)
        bare, whole = (f"bare forward, {title}", forward), (f"evaluation, {title}", loop)
        return compare("eval", bare, whole, args, "ms", n)


def _evaluation_data(args, root):
    config = Config()
    settings = config.data.test
    config.data.data_root, config.data.num_workers = str(root), args.num_workers
    config.task.name = "joint"
    settings.args.transform_args.crop_size, settings.batch_size = args.eval_crop, args.eval_batch
    data = StepData(config)
    select = data.select
    data.select = lambda *which: select(*which)[: args.eval_images]
    return data
