"""Train one step of a continual segmentation task on VOC 2012, and evaluate it."""

import utils.program  # noqa: F401

from configs.options import parse_train
from trainer.run import train
from utils.distributed import launch

if __name__ == "__main__":
    launch(train, *parse_train())
