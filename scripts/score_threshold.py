"""Mean IoU of a trained step against the score that its prediction asks for (METHOD 2: 0.5).

python scripts/score_threshold.py _saved_experiments/models/overlap_5-3_EIR-seed1/step_5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data_loader.data_loaders import StepData
from models import DeepLabV3
from trainer.evaluate import evaluate
from utils.checkpoint import final_checkpoint, load_weights, read_checkpoint
from utils.config_file import load_config
from utils.distributed import device
from utils.errors import UserError, exit_with

SCORES = (0.5, 0.4, 0.3, 0.2)


def mean_iou(folder: Path, scores: tuple[float, ...] = SCORES) -> list[dict]:
    """IoU in percent (overall, old, new, by_class) on the step's test images, for each score."""
    config = load_config(folder / "config.json")[0]
    path = final_checkpoint(folder)
    if path is None:
        raise UserError(f"no model in {folder}: give the folder of a finished step")
    data = StepData(config)
    model = DeepLabV3(data.classes, config.arch.args.backbone)
    load_weights(model, read_checkpoint(path)["state_dict"], path)
    model.to(device(), memory_format=torch.channels_last)
    metrics = (evaluate(model, data, "test", device(), score) for score in scores)
    return [m["Mean_Intersection_over_Union"] for m in metrics]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a finished step")
    folder = parser.parse_args().folder
    try:
        results = mean_iou(folder)
    except UserError as error:
        exit_with(error)
    names = results[0]["by_class"]
    print(f"{'score':<14}" + "".join(f"{score:>8}" for score in SCORES))
    print(f"{'all':<14}" + "".join(f"{r['overall']:>8.1f}" for r in results))
    for name in names:
        print(f"{name:<14}" + "".join(f"{r['by_class'][name]:>8.1f}" for r in results))


if __name__ == "__main__":
    main()
