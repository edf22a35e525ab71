"""train_voc.py on the CPU as on a machine with two GPUs: it starts two processes by itself.

They import this file too, and so find the same two GPUs. With NOT_FINITE_IN the losses of the process
of that rank are no numbers.
"""

import os

import utils.program  # noqa: F401

from configs.options import parse_train
from trainer.base_step import BaseStep
from trainer.run import train
from utils import distributed

distributed.usable_gpus = lambda: 2
terms_of_an_image = BaseStep.terms


def terms(step, z, label):
    factor = float("nan") if os.environ["NOT_FINITE_IN"] == str(distributed.rank()) else 1
    return {name: factor * value for name, value in terms_of_an_image(step, z, label).items()}


if "NOT_FINITE_IN" in os.environ:
    BaseStep.terms = terms

if __name__ == "__main__":
    distributed.launch(train, *parse_train())
