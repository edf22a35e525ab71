"""Train a step of EIR in which the teacher's scores are the old classes' targets in the background.

python docs/results/surroundings/soft_targets.py -c configs/config_photographs.json \
    --pseudo_labels off --replay image ...

The flags are those of train_voc.py; the distillation must be on. Where neither label, pseudo label nor
instance names a class, the target of an old class in the BCE is the score of the teacher, not zero, as
in DKD's L_kd; without pseudo labels that is all of the background.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import trainer.incremental
from configs.options import parse_train
from models.losses import bce_sum, distillation_sum
from trainer.run import train
from utils.distributed import launch


def main() -> None:
    config, call = parse_train(sys.argv[1:])
    weight, free = config.hyperparameter.kd / config.hyperparameter.mbce, None

    def remember(logits, labels, classes, weights, pos_weight):
        nonlocal free
        free = (labels == 0) & (weights.sum(dim=0) == 0)
        return bce_sum(logits, labels, classes, weights, pos_weight)

    def with_targets(logits, teacher, *others):
        """distillation_sum, less what the targets take from the BCE, in the weight of the former."""
        known = slice(1, len(teacher))
        taken = ((teacher[known].sigmoid() * logits[known]).sum(dim=0) * free).sum()
        return distillation_sum(logits, teacher, *others) - taken / weight

    trainer.incremental.bce_sum = remember
    trainer.incremental.distillation_sum = with_targets
    launch(train, config, call)


if __name__ == "__main__":
    main()
