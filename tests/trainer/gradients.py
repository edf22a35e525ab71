"""Gradients of the first iteration and the evaluation, in float64, written by the first process.

Arguments: data root, folder for outputs, batch size of a process, micro-batches, file to write; and
for step 1 of DKD the model before.
"""

import sys
from pathlib import Path

import torch

from configs.options import Config
from data_loader.data_loaders import StepData, make_loader
from tests.helpers import small_config
from trainer.base_step import BaseStep
from trainer.dkd import DKDStep
from trainer.evaluate import confusion_matrix, evaluate
from trainer.meter import Meter
from utils.distributed import gather, launch, rank


def work(config: Config, output: str, previous: str | None) -> None:
    torch.set_default_dtype(torch.float64)
    data = StepData(config)
    trainer = DKDStep(config, data, None, Path(previous)) if previous else BaseStep(config, data)
    trainer.prepare()
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Dropout)):
            module.eval()
    found = {}

    def keep(*_):
        found.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        )

    trainer.optimizer.register_step_pre_hook(keep)
    raw = next(iter(make_loader(trainer.dataset, trainer.batches, 0, pin=False)))
    with Meter("", 1, trainer.device, shown=False) as meter:
        trainer.train_iteration(raw, meter)
    loss = meter.means()["loss"]
    void, ids = gather(int((raw["label"] == 255).sum())), gather(raw["id"])
    torch.set_default_dtype(torch.float32)
    trainer.model.float()
    counts = confusion_matrix(trainer.model, data, "test", trainer.device)
    metrics = evaluate(trainer.model, data, "test", trainer.device)
    if rank() == 0:
        content = {"gradients": found, "loss": loss, "void": void, "ids": ids}
        torch.save({**content, "counts": torch.from_numpy(counts), "metrics": metrics}, output)


if __name__ == "__main__":
    root, folder, size, pieces, output, *previous = sys.argv[1:]
    settings = {"freeze_bn": True, "pos_weight": 2.0, "ac": 0.5}
    settings |= {"bs": int(size), "accumulate": int(pieces), "replay": "none"}
    settings |= {"method": "dkd", "task_step": 1} if previous else {}
    launch(
        work,
        small_config(Path(root), Path(folder), data_loader__args__test__batch_size=3, **settings),
        output,
        *(previous or [None]),
    )
