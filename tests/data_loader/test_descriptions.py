"""Data sets other than VOC 2012: by a description alone, without code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.options import CONFIGS, load_config
from data_loader.data_loaders import StepData
from data_loader.data_root import DataRoot
from data_loader.tasks import get_task
from scripts.make_synthetic_voc import make_synthetic_voc
from scripts.show_splits import main as show_splits
from tests.helpers import PROJECT, error_line, run_script, small_config, train_flags
from utils.errors import UserError


@pytest.fixture(scope="module")
def ade_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 150 classes in the layout of ADEChallengeData2016, its labels grey."""
    made = make_synthetic_voc(tmp_path_factory.mktemp("made"), 60, 40, 64, classes=150)
    root = tmp_path_factory.mktemp("ade")
    for year, split in (("2007", "training"), ("2008", "validation")):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for path in (made / "JPEGImages").glob(f"{year}_*"):
            shutil.copy(path, root / "images" / split)
            label = np.array(Image.open(made / "SegmentationClassAug" / f"{path.stem}.png"))
            Image.fromarray(label).save(root / "annotations" / split / f"{path.stem}.png")
    return root


class TestADE:
    def test_the_configuration_is_the_familys(self):
        config, ignored = load_config(CONFIGS / "config_ade.json")
        assert not ignored and list(config.data.dataset.classes.values()) == list(range(1, 151))
        assert (config.data.train.batch_size, config.trainer.epochs) == (24, 100)
        assert (config.optimizer.args.lr, config.data.memory.mem_size) == (0.0025, 300)

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("100-50", [100, 50]),
            ("100-10", [100] + [10] * 5),
            ("100-5", [100] + [5] * 10),
            ("50-50", [50, 50, 50]),
            ("joint", [150]),
        ],
    )
    def test_tasks(self, name, sizes):
        classes = load_config(CONFIGS / "config_ade.json")[0].data.dataset.classes
        task = get_task(name, "overlap", classes)
        assert [len(step) for step in task.steps] == sizes and task.order == tuple(range(1, 151))
        assert task.class_names(0)[:3] == ["background", "wall", "building"]

    def test_the_tasks_of_voc_are_none_of_it(self):
        classes = load_config(CONFIGS / "config_ade.json")[0].data.dataset.classes
        for name in ("15-1_b", "5-3-60", "19-1_x"):
            with pytest.raises(UserError, match=r"choose .*100-50.* or joint"):
                get_task(name, "overlap", classes)

    def test_splits_are_those_of_the_label_maps(self, ade_root, capsys):
        flags = ["-c", str(CONFIGS / "config_ade.json"), "--data_root", str(ade_root)]
        assert show_splits([*flags, "--task_name", "100-10", "--json"]) == 0
        steps = json.loads(capsys.readouterr().out)["steps"]
        for step, classes in ((0, range(1, 101)), (3, range(121, 131))):
            shown = {
                path.stem
                for path in (ade_root / "annotations" / "training").iterdir()
                if np.isin(np.array(Image.open(path)), list(classes)).any()
            }
            assert set(steps[step]["train"]) == shown

    def test_both_steps_train_and_an_evaluation_agrees(self, ade_root, tmp_path):
        common = train_flags(ade_root, tmp_path, epochs=1, task_name="100-50", mem_size=30)
        for step in (0, 1):
            done = run_script("train_ade.py", *common, "--task_step", step)
            assert done.returncode == 0, done.stderr
        folder = tmp_path / "models" / "overlap_100-50_EIR" / "step_1"
        again = tmp_path / "again.json"
        checkpoint = folder / "checkpoint-epoch1.pth"
        done = run_script("eval_ade.py", "-r", checkpoint, "--output", again)
        assert done.returncode == 0, done.stderr
        assert json.loads(again.read_text()) == json.loads((folder / "metrics.json").read_text())


class TestPartOfASet:
    """The animals: six classes of VOC's label maps, in an order of their own."""

    def test_other_ids_are_background(self, voc_root, tmp_path):
        config, _ = load_config(CONFIGS / "config_voc_animals.json")
        small = small_config(voc_root, tmp_path, task_name="2-1")
        small.data.dataset = config.data.dataset
        data = StepData(small)
        assert data.task.steps == ((8, 12), (15,), (10,), (13,), (17,))
        for i in range(len(data.training())):
            _, label = data.training().load(i)
            stored = np.array(Image.open(data.training().labels[i]))
            expected = np.zeros_like(stored)
            expected[stored == 8], expected[stored == 12], expected[stored == 255] = 1, 2, 255
            assert np.array_equal(label.numpy(), expected)


class TestOwnSet:
    """Seven classes, names and folders of one's own, by a JSON file."""

    @pytest.fixture
    def own(self, tmp_path):
        made = make_synthetic_voc(tmp_path / "made", 30, 15, 64, classes=7)
        root = tmp_path / "own"
        for old, new in (("JPEGImages", "photos"), ("SegmentationClassAug", "masks")):
            shutil.copytree(made / old, root / new)
        for name in ("train_aug", "val"):
            lines = (made / f"ImageSets/Segmentation/{name}.txt").read_text().split()[::2]
            (root / f"{name}.txt").write_text("\n".join(Path(line).stem for line in lines))
        dataset = {
            "name": "parts", "classes": {f"part {i}": i for i in (3, 1, 2, 4, 5, 6, 7)},
            "highest_id": 7, "train_list": "train_aug.txt", "val_list": "val.txt",
            "train_images": "photos/{}.jpg", "train_labels": ["masks/{}.png"],
            "val_images": "photos/{}.jpg", "val_labels": ["masks/{}.png"],
        }  # fmt: skip
        (tmp_path / "own.json").write_text(json.dumps({"data_loader": {"args": {"dataset": dataset}}}))
        return tmp_path

    def test_a_step_trains_by_its_description_alone(self, own):
        flags = train_flags(own / "own", own / "out", task_name="4-3", epochs=1)
        done = run_script("train_voc.py", "-c", own / "own.json", *flags)
        assert done.returncode == 0, done.stderr
        assert "the whole of" not in done.stdout  # VOC's numbers are none of it
        metrics = own / "out" / "models" / "overlap_4-3_EIR" / "step_0" / "metrics.json"
        by_class = json.loads(metrics.read_text())["Mean_Intersection_over_Union"]["by_class"]
        assert list(by_class) == ["background", "part 3", "part 1", "part 2", "part 4"]

    def test_zero_may_mean_void(self, own):
        description = load_config(own / "own.json")[0].data.dataset
        config = small_config(own / "own", own / "out", task_name="4-3", replay="image")
        config.data.dataset, description.zero = description, "void"
        images = StepData(config).training()
        stored = np.array(Image.open(images.labels[0]))
        assert (images.load(0)[1].numpy()[stored == 0] == 255).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"classes": {"a": 0}}, "from 1 to 254"),
            ({"classes": {"a": 1, "b": 1}}, "all different"),
            ({"classes": {"background": 1}}, "background is none of them"),
            ({"classes": ["a"]}, "must be an object"),
            ({"train_images": "photos/x.jpg"}, "{} stands for the id"),
            ({"val_labels": []}, "{} stands for the id"),
            ({"highest_id": 6}, "the id 7, above its highest_id of 6"),
            ({"train_list": None, "train_images": "photos/{}.png"}, "no image"),
            ({"folders": ["elsewhere"]}, "has no photos folder"),
        ],
    )
    def test_a_wrong_description_is_one_line(self, own, changes, message):
        path = own / "own.json"
        content = json.loads(path.read_text())
        content["data_loader"]["args"]["dataset"].update(changes)
        path.write_text(json.dumps(content))
        flags = train_flags(own / "own", own / "out", task_name="4-3")
        assert message in error_line(run_script("train_voc.py", "-c", path, *flags))


def test_lists_of_the_project_serve_a_root_without_them(own_root):
    description = load_config(CONFIGS / "config_photographs.json")[0].data.dataset
    with pytest.raises(UserError, match="files named by"):
        DataRoot(own_root, description=description).read_list("train")
    assert (PROJECT / description.train_list).is_file()
