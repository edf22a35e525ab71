"""Train a step with each stored entry several times an epoch.

python docs/results/surroundings/replay_often.py 3 -c configs/config_photographs.json --epochs 6 ...

The first argument says how many times, each time in a window of its own; what follows are flags of
train_voc.py. An epoch is longer by that: choose --epochs so that the number of images is the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

from configs.options import parse_train
from trainer.later_step import LaterStep
from trainer.run import train
from utils.distributed import launch

training_set_once = LaterStep.training_set


def main() -> None:
    times = int(sys.argv[1])

    def training_set(step, seen=None):
        samples = training_set_once(step, seen)
        for part in ("entries", "images", "labels", "drawn_for"):
            setattr(samples.memory, part, getattr(samples.memory, part) * times)
        return samples

    LaterStep.training_set = training_set
    launch(train, *parse_train(sys.argv[2:]))


if __name__ == "__main__":
    main()
