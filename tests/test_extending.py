"""docs/EXTENDING.md: its example is a method that trains."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_loader.data_loaders import StepData
from models.deeplabv3 import predict, upsample_logits
from tests.helpers import PROJECT, small_config
from tests.trainer.steps import raw_batch, run, training_mode
from trainer.base_step import BaseStep
from trainer.run import STEPS
from utils.checkpoint import final_checkpoint

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def step():
    """The class of the first code block of the page."""
    code = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/EXTENDING.md").read_text(), re.DOTALL)[0]
    assert len(code.splitlines()) <= 40
    names = {}
    exec(compile(code, "docs/EXTENDING.md", "exec"), names)
    return names["LwFStep"]


def test_the_example_trains_and_its_loss_is_what_it_says(step, voc_root, tmp_path, monkeypatch):
    monkeypatch.setitem(STEPS, "lwf", (BaseStep, step))
    changes = {"method": "lwf", "replay": "none", "epochs": 1}
    run(small_config(voc_root, tmp_path, **changes))
    config = small_config(voc_root, tmp_path, task_step=1, freeze_bn=True, **changes)
    run(config)
    (record,) = (config.step_dir(kind="log") / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(record)[name] for name in ("loss", "bce", "kd")]).all()
    assert (config.step_dir() / "metrics.json").is_file()

    before = final_checkpoint(config.step_dir(0))
    trainer = step(config, StepData(config), previous=before)
    trainer.prepare()
    training_mode(trainer)
    (batch,) = trainer.to_device(raw_batch(trainer))
    loss, _ = trainer.training_loss(batch)
    with torch.no_grad():
        logits = trainer.model(batch.images)
        answers = upsample_logits(trainer.teach(batch.images), batch.labels.shape[-2:]).sigmoid()
    targets = [answers[:, c] for c in range(6)] + [(batch.labels == c).float() for c in (6, 7, 8)]
    means = [
        F.binary_cross_entropy_with_logits(logits[:, c], target) for c, target in enumerate(targets)
    ]
    assert loss.item() == pytest.approx((5 * sum(means[:6]) + sum(means[6:])).item(), rel=1e-5)


def test_a_softmax_over_logits_less_the_background_s_predicts_its_best_channel():
    logits = torch.randn(4, 6, 9, 9)
    best = logits.softmax(dim=1).argmax(dim=1)
    assert (best == 0).any() and (best > 0).any()
    assert (predict(logits - logits[:, :1]) == best).all()
