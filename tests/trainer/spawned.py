"""train_voc.py on the CPU as on a machine with two GPUs: it starts two processes by itself.

They import this file too, and so find the same two GPUs.
"""

import utils.program  # noqa: F401

from configs.options import parse_train
from trainer.run import train
from utils import distributed

distributed.usable_gpus = lambda: 2

if __name__ == "__main__":
    distributed.launch(train, *parse_train())
