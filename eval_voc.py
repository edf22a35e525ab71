"""Evaluate a checkpoint on the test images of its step."""

import utils.program  # noqa: F401

from configs.options import parse_eval
from trainer.run import evaluate_checkpoint
from utils.distributed import launch

if __name__ == "__main__":
    launch(evaluate_checkpoint, *parse_eval())
