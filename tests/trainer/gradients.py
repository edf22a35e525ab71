"""The first iteration of a step and the evaluation, in float64, written by the first process.

Arguments: data root, folder for outputs, file to write, the changes of `small_config` as JSON, and for
step 1 the model of step 0.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch

from configs.options import Config
from data_loader import data_loaders
from data_loader.data_loaders import StepData, make_loader
from tests.helpers import small_config
from trainer.evaluate import confusion_matrix, evaluate
from trainer.incremental import IncrementalStep
from trainer.meter import Meter
from trainer.run import STEPS
from utils.distributed import gather, launch, rank


def work(config: Config, output: str, previous: str | None = None) -> None:
    torch.set_default_dtype(torch.float64)
    data = StepData(config)
    kind = STEPS[config.method][data.step]
    trainer = kind(config, data, previous=Path(previous) if previous else None)
    with mock.patch.object(data_loaders, "draw_memory", wraps=data_loaders.draw_memory) as draw_memory:
        trainer.prepare()
    trainer.train_mode()
    gradients, seen = {}, {"draws": draw_memory.call_count, "pseudo labels": 0, "pasted": 0}

    def keep(*_):
        gradients.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        )

    def watched(batch, labels):
        composite = compose(batch, labels)
        seen["pseudo labels"] += int((labels != batch.labels).sum())
        seen["pasted"] += int((composite.weights > 0).sum())
        return composite

    trainer.optimizer.register_step_pre_hook(keep)
    if isinstance(trainer, IncrementalStep):
        compose, trainer.compose = trainer.compose, watched
    raw = next(iter(make_loader(trainer.dataset, trainer.batches, 0, pin=False)))
    with Meter("", 1, trainer.device, shown=False) as meter:
        trainer.train_iteration(raw, meter)
    seen["void"] = int((raw["label"] == 255).sum())
    seen["replayed"] = int(raw["replayed"].sum())
    memory = trainer.dataset.memory
    memory = memory.digest if memory else None
    content = {
        "gradients": gradients,
        "losses": meter.means(),
        "statistics": dict(trainer.model.named_buffers()),
    }
    content |= {"seen": gather(seen), "ids": gather(raw["id"]), "memories": gather(memory)}
    torch.set_default_dtype(torch.float32)
    trainer.model.float()
    counts = confusion_matrix(trainer.model, data, "test", trainer.device)
    metrics = evaluate(trainer.model, data, "test", trainer.device)
    if rank() == 0:
        torch.save({**content, "counts": torch.from_numpy(counts), "metrics": metrics}, output)


if __name__ == "__main__":
    root, folder, output, changes, *previous = sys.argv[1:]
    launch(work, small_config(Path(root), Path(folder), **json.loads(changes)), output, *previous)
