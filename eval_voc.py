"""Evaluate a checkpoint on the test images of its step."""

from trainer.run import evaluate_checkpoint
from utils.arguments import parse_eval
from utils.distributed import launch

if __name__ == "__main__":
    launch(evaluate_checkpoint, *parse_eval())
