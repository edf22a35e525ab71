"""The score that a prediction asks for: at one half the metrics of the step itself."""

import json

import pytest

from scripts.score_threshold import mean_iou
from tests.helpers import small_config
from trainer.run import train
from utils.arguments import Run
from utils.checkpoint import write_json
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu")


def test_one_half_is_what_the_evaluation_asks_for(voc_root, tmp_path):
    config = small_config(voc_root, tmp_path, lr=0.02)
    train(config, Run(ignored=[]))
    folder = config.step_dir()
    metrics = json.loads((folder / "metrics.json").read_text())
    half, none, all_ = mean_iou(folder, (0.5, 1.0, 0.0))
    assert half == metrics["Mean_Intersection_over_Union"]
    classes = set(half["by_class"]) - {"background"}
    assert all(none["by_class"][name] == 0 for name in classes)  # nothing but background
    assert all_["by_class"]["background"] == 0 < none["by_class"]["background"]


def test_a_folder_without_a_model(voc_root, tmp_path):
    with pytest.raises(UserError, match="cannot read the configuration"):
        mean_iou(tmp_path)
    config = small_config(voc_root, tmp_path)
    write_json(tmp_path / "config.json", config.to_dict())
    with pytest.raises(UserError, match="no model in"):
        mean_iou(tmp_path)
