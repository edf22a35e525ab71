"""Evaluate a checkpoint of ADE20K on the test images of its step; as eval_voc.py, which reads the
configuration beside the checkpoint too.
"""

import sys

import utils.program  # noqa: F401

from configs.options import CONFIGS, parse_eval
from trainer.run import evaluate_checkpoint
from utils.distributed import launch

if __name__ == "__main__":
    launch(evaluate_checkpoint, *parse_eval(sys.argv[1:], CONFIGS / "config_ade.json", "eval_ade.py"))
