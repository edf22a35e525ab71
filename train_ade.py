"""Train one step of a continual segmentation task on ADE20K, and evaluate it: train_voc.py with
configs/config_ade.json for a configuration, unless -c names another one.

python train_ade.py --task_name 100-50 --task_step 0
python train_ade.py --task_name 100-50 --task_step 1 --lr 0.00025 --freeze_bn
"""

import sys

from configs.options import CONFIGS, parse_train
from trainer.run import train
from utils.distributed import launch

if __name__ == "__main__":
    launch(train, *parse_train(sys.argv[1:], CONFIGS / "config_ade.json"))
