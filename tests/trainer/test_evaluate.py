"""Evaluation: each image once, the same numbers however it is done, against scikit-learn."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from configs.options import EvalCall, TrainCall
from data_loader.data_loaders import StepData
from data_loader.dataset import normalize
from models import DeepLabV3
from tests.helpers import small_config
from trainer import run
from trainer.evaluate import confusion_matrix, evaluate
from utils.checkpoint import final_checkpoint, read_checkpoint, save_checkpoint
from utils.errors import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = DeepLabV3([5, 3], "tiny").to(memory_format=torch.channels_last)
    with torch.no_grad():
        for classifier in net.cls[1:]:
            classifier.bias.fill_(-0.3)
    net.train()
    for _ in range(40):
        net(torch.randn(4, 3, 64, 64))
    return net


def step_data(root, folder, **changes):
    return StepData(small_config(root, folder, task_step=1, **changes))


def by_hand(model, dataset):
    """Targets and predictions of all pixels, image by image."""
    targets, predictions = [], []
    model.eval()
    for i in range(len(dataset)):
        sample = dataset[i]
        with torch.no_grad():
            scores = model(normalize(sample["image"][None]))[0, 1:].sigmoid().numpy()
        best = np.where(scores.max(axis=0) > 0.5, scores.argmax(axis=0) + 1, 0)
        known = sample["label"].numpy() != 255
        targets.append(sample["label"].numpy()[known])
        predictions.append(best[known])
    return np.concatenate(targets), np.concatenate(predictions)


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize("transform", [True, False])
def test_iou_equals_scikit_learn_over_all_pixels(voc_root, tmp_path, model, split, transform):
    data = step_data(voc_root, tmp_path, **{f"data_loader__args__{split}__args__transform": transform})
    dataset, size = data.evaluation(split)
    assert transform or size == 1
    targets, predictions = by_hand(model, dataset)
    assert len(set(predictions.tolist())) > 2
    metrics = evaluate(model, data, split, CPU)["Mean_Intersection_over_Union"]
    expected = 100 * jaccard_score(targets, predictions, labels=range(9), average=None, zero_division=0)
    assert list(metrics["by_class"].values()) == pytest.approx(expected.tolist(), abs=0.02)
    assert metrics["old"] == pytest.approx(expected[:6].mean(), abs=0.02)
    assert metrics["new"] == pytest.approx(expected[6:].mean(), abs=0.02)


def test_every_known_pixel_is_counted_once(voc_root, tmp_path, model):
    data = step_data(voc_root, tmp_path)
    dataset, _ = data.evaluation("test")
    labels = torch.stack([dataset[i]["label"] for i in range(len(dataset))]).flatten().long()
    rows = torch.bincount(labels[labels != 255], minlength=9).tolist()
    assert confusion_matrix(model, data, "test", CPU).sum(axis=1).tolist() == rows


def test_workers_change_nothing_and_the_model_is_left_as_it_was(voc_root, tmp_path, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    counts = []
    for workers, training in ((0, True), (2, False)):
        model.train(training)
        data = step_data(voc_root, tmp_path, num_workers=workers)
        counts.append(confusion_matrix(model, data, "test", CPU))
        assert model.training is training
    assert np.array_equal(*counts)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_evaluation_keeps_cudnn_and_leaves_tf32(voc_root, tmp_path):
    config = small_config(voc_root, tmp_path)
    data, seen = StepData(config), []

    class Watched(DeepLabV3):
        def forward(self, images, upsample=True):
            cudnn = torch.backends.cudnn
            seen.append((cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
            return super().forward(images, upsample)

    evaluate(Watched(data.classes, "tiny"), data, "test", torch.device("cpu"))
    assert set(seen) == {(True, False, True, False)}


def test_classes_whose_zero_is_no_error_are_named(own_root, tmp_path, model):
    """Of 5-3: the bird of step 0 is in no training label, the bus of step 1 in no validation label."""
    for year, lacking in ((2007, 3), (2008, 6)):  # of the training and of the validation images
        for path in own_root.glob(f"SegmentationClassAug/{year}_*.png"):
            label = np.array(Image.open(path))
            label[label == lacking] = 0
            Image.fromarray(label).save(path)
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.cls[1].bias[2], model.cls[2].bias[0] = -9, -9  # neither is ever predicted
    metrics = evaluate(model, step_data(own_root, tmp_path), "test", CPU)
    assert metrics["Mean_Intersection_over_Union"]["without_images"] == ["bird", "bus"]
    assert "without_images" not in metrics["Pixel_Accuracy_Class"]


def test_other_data_than_the_trainings_are_named(own_root, tmp_path, warnings, monkeypatch):
    """And do not excuse the model: it was shown the birds that the training images of now lack."""
    monkeypatch.setattr(run, "set_up_logging", lambda *_: None)

    def hide(*lacking):
        for year, id in zip((2007, 2008), lacking, strict=False):  # training, validation images
            for path in own_root.glob(f"SegmentationClassAug/{year}_*.png"):
                label = np.array(Image.open(path))
                label[label == id] = 0
                Image.fromarray(label).save(path)

    hide(4)
    config = small_config(own_root, tmp_path, epochs=1)
    run.train(config, TrainCall())
    result = tmp_path / "result.json"
    call = EvalCall(resume=str(final_checkpoint(config.step_dir())), output=str(result))
    run.evaluate_checkpoint(config, call)
    assert not any("are not those of the training" in text for text in warnings)
    iou = json.loads(result.read_text())["Mean_Intersection_over_Union"]
    assert iou["without_images"] == ["boat"]
    hide(3, 5)
    run.evaluate_checkpoint(config, call)
    for split in ("training", "validation"):
        words = f"the {split} list or its labels are not those of the training of {call.resume}"
        assert any(words in text for text in warnings)
    iou = json.loads(result.read_text())["Mean_Intersection_over_Union"]
    assert iou["by_class"]["bird"] == 0 and iou["without_images"] == ["bottle"]


def test_a_final_checkpoint_that_was_replaced_is_named(own_root, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(run, "set_up_logging", lambda *_: None)
    config = small_config(own_root, tmp_path, epochs=1)
    run.train(config, TrainCall())
    path = final_checkpoint(config.step_dir())
    run.evaluate_checkpoint(config, EvalCall(resume=str(path)))
    assert not any("has changed" in text for text in warnings)
    content = read_checkpoint(path)
    content["state_dict"]["cls.1.bias"] += 5
    save_checkpoint(path, content)
    run.evaluate_checkpoint(config, EvalCall(resume=str(path)))
    words = f"{path} has changed since its step was finished: these results are not that step's"
    assert warnings.count(words) == 1


def test_logits_that_are_no_numbers_are_an_error(voc_root, tmp_path, model):
    """They would count as background."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.cls[2].bias[0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        evaluate(model, step_data(voc_root, tmp_path), "test", CPU)
