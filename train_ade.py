"""Train one step of a continual segmentation task on ADE20K, and evaluate it: train_voc.py with
configs/config_ade.json for a configuration, unless -c names another one.
"""

import sys

import utils.program  # noqa: F401

from configs.options import CONFIGS, parse_train
from trainer.run import train
from utils.distributed import launch

if __name__ == "__main__":
    launch(train, *parse_train(sys.argv[1:], CONFIGS / "config_ade.json", "train_ade.py"))
