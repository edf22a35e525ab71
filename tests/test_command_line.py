"""The entry points as a user meets them: bad input, finished and interrupted steps."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import PROJECT, error_line, run_script, snapshot, train_flags
from utils.checkpoint import read_checkpoint

STEP = "overlap_5-3_EIR/step_0"
CHECKPOINT = "checkpoint-epoch1.pth"


class CreatesFile:
    """A pickle that would create a file when it is loaded carelessly."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def trained(voc_root, tmp_path_factory):
    """Folder of a finished step of one epoch, to be read only."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_script("train_voc.py", *train_flags(voc_root, folder, epochs=1))
    assert result.returncode == 0, result.stderr
    return folder / "models" / STEP


class TestTrainAndEvaluate:
    def test_outputs_of_a_step(self, trained):
        names = {path.name for path in trained.iterdir()}
        assert names == {"checkpoint-epoch1.pth", "config.json", "last.pth", "metrics.json"}
        log = trained.parents[2] / "log" / STEP
        assert (log / "log.txt").is_file() and (log / "metrics.jsonl").is_file()
        metrics = json.loads((trained / "metrics.json").read_text())
        for name, values in metrics.items():
            assert {"overall", "old", "new", "harmonic"} <= values.keys()
            assert values["new"] is None and values["harmonic"] is None
            assert ("by_class" in values) == (name != "Pixel_Accuracy")
        classes = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle"]
        assert list(metrics["Mean_Intersection_over_Union"]["by_class"]) == classes

    def test_evaluation_repeats_the_reported_numbers(self, trained, tmp_path, command):
        output = tmp_path / "again.json"
        checkpoint = trained / "checkpoint-epoch1.pth"
        result = command("eval_voc.py", "-d", 0, "--test", "-r", checkpoint, "--output", output)
        assert result.returncode == 0, result.stderr
        assert output.read_text() == (trained / "metrics.json").read_text()
        iou = json.loads(output.read_text())["Mean_Intersection_over_Union"]
        assert f"background       old{iou['by_class']['background']:9.2f}" in result.stdout

    def test_train_with_test_evaluates_only(self, trained, voc_root, command):
        before = snapshot(trained)
        flags = train_flags(voc_root, trained.parents[2], epochs=1)
        result = command("train_voc.py", *flags, "--test")
        assert result.returncode == 0, result.stderr
        assert "Mean_Intersection_over_Union" in result.stdout
        assert snapshot(trained) == before

    def test_a_finished_step_is_not_trained_again(self, trained, voc_root, command):
        before = snapshot(trained)
        result = command("train_voc.py", *train_flags(voc_root, trained.parents[2], epochs=1))
        assert result.returncode == 0
        assert "is finished already" in result.stdout and "--overwrite" in result.stdout
        assert snapshot(trained) == before

    def test_a_step_killed_before_its_evaluation_is_finished_on_resuming(
        self, trained, voc_root, tmp_path, command
    ):
        folder = Path(shutil.copytree(trained, tmp_path / "models" / STEP))
        written = {name: (folder / name).read_bytes() for name in ("metrics.json", CHECKPOINT)}
        for name in written:
            (folder / name).unlink()
        flags = train_flags(voc_root, tmp_path, epochs=1)
        assert command("train_voc.py", *flags, "--resume", "auto").returncode == 0
        assert (folder / "metrics.json").read_bytes() == written["metrics.json"]
        one, other = (read_checkpoint(f / CHECKPOINT)["state_dict"] for f in (trained, folder))
        assert all(torch.equal(one[key], other[key]) for key in one)

    @pytest.mark.parametrize(
        ("changes", "key"),
        [({"lr": 0.02}, "optimizer.args.lr"), ({"seed": 2}, "seed"), ({"epochs": 3}, "trainer.epochs")],
    )
    def test_a_finished_step_with_other_settings_is_refused(
        self, trained, voc_root, command, changes, key
    ):
        before = snapshot(trained)
        flags = train_flags(voc_root, trained.parents[2], **{"epochs": 1, **changes})
        line = error_line(command("train_voc.py", *flags))
        assert f"({key})" in line and "--overwrite" in line
        assert snapshot(trained) == before

    def test_an_unfinished_step_offers_to_resume(self, trained, voc_root, tmp_path, command):
        folder = tmp_path / "models" / STEP
        folder.mkdir(parents=True)
        (folder / "last.pth").write_bytes((trained / "last.pth").read_bytes())
        before = snapshot(folder)
        line = error_line(command("train_voc.py", *train_flags(voc_root, tmp_path)))
        assert "unfinished" in line and "--resume auto" in line and "--overwrite" in line
        assert snapshot(folder) == before

    def test_overwrite_trains_anew(self, voc_root, tmp_path, command):
        flags = train_flags(voc_root, tmp_path, epochs=1)
        for seed in (1, 2):
            result = command("train_voc.py", *flags, "--seed", seed, "--overwrite")
            assert result.returncode == 0, result.stderr
            assert "epoch 1/1: " in result.stdout
        config = json.loads((tmp_path / "models" / STEP / "config.json").read_text())
        assert config["seed"] == 2


class TestKilledRun:
    def test_resume_after_a_kill_gives_the_weights_of_an_uninterrupted_run(self, voc_root, tmp_path):
        settings = {"epochs": 6, "bs": 2, "num_workers": 1}
        killed = train_flags(voc_root, tmp_path / "killed", **settings)
        process = subprocess.Popen(
            [sys.executable, "train_voc.py", *killed],
            cwd=PROJECT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        last = tmp_path / "killed" / "models" / STEP / "last.pth"
        while process.poll() is None and not last.is_file():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 1 <= read_checkpoint(last)["epoch"] < 6
        assert not (last.parent / "metrics.json").exists()

        resumed = run_script("train_voc.py", *killed, "--resume", "auto")
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed after epoch" in resumed.stdout
        whole = run_script("train_voc.py", *train_flags(voc_root, tmp_path / "whole", **settings))
        assert whole.returncode == 0, whole.stderr
        folders = [tmp_path / name / "models" / STEP for name in ("killed", "whole")]
        ours, theirs = (read_checkpoint(f / "checkpoint-epoch6.pth") for f in folders)
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        for key, value in theirs["state_dict"].items():
            assert torch.equal(ours["state_dict"][key], value), key
        states = [c["optimizer"]["state"] for c in (ours, theirs)]
        assert states[0].keys() == states[1].keys() and states[0]
        for key, state in states[1].items():
            assert torch.equal(states[0][key]["momentum_buffer"], state["momentum_buffer"]), key
        assert len({(f / "metrics.json").read_text() for f in folders}) == 1
        records = (tmp_path / "killed/log" / STEP / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(record)["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]


class TestBadInput:
    """One clear line, exit code 2, and nothing written."""

    @pytest.fixture
    def refused(self, command, voc_root, tmp_path):
        """Runs train_voc.py with flags that it must refuse; the error line."""

        def call(*more, root=voc_root, **changes):
            saved = tmp_path / "saved"
            result = command("train_voc.py", *train_flags(root, saved, **changes), *more)
            assert not list(saved.rglob("*.pth")) and not list(saved.rglob("metrics.json"))
            return error_line(result)

        return call

    def test_as_a_process(self, own_root, tmp_path):
        label = own_root / "SegmentationClassAug" / "2007_000007.png"
        Image.open(label).convert("RGB").save(label)
        saved = tmp_path / "saved"
        result = run_script("train_voc.py", *train_flags(own_root, saved))
        assert f"label {label} is a colour image" in error_line(result)
        result = run_script("train_voc.py", "--data_root", tmp_path / "no", "--save_dir", saved)
        assert str(tmp_path / "no") in error_line(result)
        result = run_script("eval_voc.py", "-r", tmp_path / "no.pth")
        assert "no checkpoint at" in error_line(result)
        assert not saved.exists()

    def test_unknown_task_names_those_that_exist(self, refused):
        line = refused(task_name="7-4")
        assert "unknown task '7-4'" in line and "15-5" in line and "joint" in line

    def test_unknown_step_names_those_that_exist(self, refused):
        assert "has no step 6: its steps are 0 to 5" in refused(task_step=6)

    def test_unknown_setting_names_those_that_exist(self, refused):
        assert "overlap, disjoint, sequential" in refused(task_setting="overlapping")

    def test_missing_list(self, refused, own_root):
        (own_root / "ImageSets/Segmentation/train_aug.txt").unlink()
        assert "train_aug.txt" in refused(root=own_root)

    def test_missing_files(self, refused, own_root):
        gone = sorted((own_root / "JPEGImages").glob("2007*"))[:6]
        for path in gone:
            path.unlink()
        line = refused(root=own_root)
        assert "6 files" in line and str(gone[4]) in line and str(gone[5]) not in line

    def test_colour_label(self, refused, own_root):
        path = own_root / "SegmentationClassAug" / "2007_000007.png"
        Image.open(path).convert("RGB").save(path)
        assert f"label {path} is a colour image" in refused(root=own_root)

    def test_label_of_another_size(self, refused, own_root):
        path = own_root / "SegmentationClassAug" / "2008_000003.png"
        Image.fromarray(np.zeros((7, 5), np.uint8)).save(path)
        assert "is 5x7" in refused(root=own_root)

    def test_class_id_above_20(self, refused, own_root):
        path = own_root / "SegmentationClassAug" / "2007_000007.png"
        label = np.array(Image.open(path))
        label[3, 3] = 21
        Image.fromarray(label).save(path)
        assert f"{path} has class id 21" in refused(root=own_root)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_photograph_that_turns_out_torn_in_training(self, own_root, tmp_path, command, workers):
        paths = sorted((own_root / "JPEGImages").glob("2007*"))
        for path in paths:
            path.write_bytes(path.read_bytes()[:-400])
        flags = train_flags(own_root, tmp_path / "saved", num_workers=workers)
        line = error_line((run_script if workers else command)("train_voc.py", *flags))
        assert not list((tmp_path / "saved").rglob("*.pth"))
        name = re.search(r"cannot read the image (\S+):", line)[1]
        assert Path(name) in paths

    def test_step_without_a_training_image(self, refused, own_root):
        for path in (own_root / "SegmentationClassAug").iterdir():
            label = np.array(Image.open(path))
            label[(label > 0) & (label < 6)] = 20
            Image.fromarray(label).save(path)
        line = refused(root=own_root)
        assert "no training image" in line and "aeroplane" in line

    def test_batch_of_one_image(self, refused):
        assert "--freeze_bn" in refused(bs=1)

    def test_step_before_is_missing(self, refused):
        assert "step 0 is not finished" in refused(task_step=1)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--epochs", "many"), "--epochs must be an integer, not 'many'"),
            (("--epochs", "0"), "--epochs is 0; it must be at least 1"),
            (("--lr", "-1"), "--lr is -1.0; it must be at least 0"),
            (("--lr", "nan"), "--lr is nan"),
            (("--lr", "inf"), "--lr is inf"),
            (("--bs", "2.5"), "--bs must be an integer"),
            (("--backbone", "vgg"), "allowed: resnet101, resnet50, tiny"),
            (("--pseudo_thresh", "1.5"), "at most 1"),
            (("--fusion", "maybe"), "on, off"),
            (("--no_such_flag",), "--no_such_flag"),
            (("-d", "cuda"), "give GPU indices"),
            (("-c", "nowhere.json"), "cannot read the configuration nowhere.json"),
            (("--overwrite", "--resume", "auto"), "exclude each other"),
            (("--resume", "nowhere.pth"), "no checkpoint at nowhere.pth"),
            (("--test",), "nothing to evaluate"),
        ],
    )
    def test_flags(self, refused, flags, words):
        assert words in refused(*flags)


class TestBadCheckpoints:
    """Refused by train_voc.py --resume and by eval_voc.py, with nothing touched."""

    @pytest.fixture(params=["torn", "tiny tear", "empty", "other", "pickle", "no model", "list"])
    def bad(self, request, trained, tmp_path):
        good = trained / "last.pth"
        path = tmp_path / "bad" / "checkpoint.pth"
        path.parent.mkdir()
        data = good.read_bytes()
        if request.param == "torn":
            path.write_bytes(data[: len(data) // 2])
        elif request.param == "tiny tear":
            path.write_bytes(data[:-1])
        elif request.param == "empty":
            path.write_bytes(b"")
        elif request.param == "other":
            content = read_checkpoint(good)
            content["state_dict"]["cls.1.weight"] = torch.zeros(6, 256, 1, 1)
            torch.save(content, path)
        elif request.param == "pickle":
            trap = {"state_dict": {}, "epoch": CreatesFile(tmp_path / "executed")}
            path.write_bytes(pickle.dumps(trap, protocol=2))
        elif request.param == "no model":
            torch.save({"epoch": 1, "state_dict": {"cls.0.bias": "x"}}, path)
        else:
            torch.save([torch.zeros(2)], path)
        (path.parent / "config.json").write_bytes((trained / "config.json").read_bytes())
        return path

    def test_resume(self, bad, voc_root, trained, tmp_path, command):
        before = snapshot(trained)
        flags = train_flags(voc_root, tmp_path / "saved", epochs=1)
        line = error_line(command("train_voc.py", *flags, "--resume", bad))
        assert str(bad) in line
        assert not list((tmp_path / "saved").rglob("*.pth"))
        assert not (tmp_path / "executed").exists()
        assert snapshot(trained) == before

    def test_evaluate(self, bad, tmp_path, command):
        output = tmp_path / "metrics.json"
        line = error_line(command("eval_voc.py", "-r", bad, "--output", output))
        assert str(bad) in line
        assert not output.exists() and not (tmp_path / "executed").exists()

    def test_zipped_pickle_is_not_executed(self, trained, tmp_path, command):
        path = tmp_path / "checkpoint.pth"
        torch.save({"state_dict": {}, "epoch": CreatesFile(tmp_path / "executed")}, path)
        assert not (tmp_path / "executed").exists()
        line = error_line(command("eval_voc.py", "-r", path, "-c", trained / "config.json"))
        assert str(path) in line
        assert not (tmp_path / "executed").exists()

    def test_torn_last_checkpoint_leaves_the_folder_alone(self, trained, voc_root, tmp_path, command):
        folder = tmp_path / "models" / STEP
        folder.mkdir(parents=True)
        (folder / "last.pth").write_bytes((trained / "last.pth").read_bytes()[:-5000])
        before = snapshot(folder)
        flags = train_flags(voc_root, tmp_path, epochs=1)
        assert "is damaged" in error_line(command("train_voc.py", *flags, "--resume", "auto"))
        assert snapshot(folder) == before

    def test_another_architecture_is_named_by_its_first_key(self, trained, voc_root, tmp_path, command):
        alone = Path(shutil.copy(trained / "last.pth", tmp_path / "alone.pth"))
        flags = train_flags(voc_root, tmp_path, epochs=1, task_name="15-5")
        line = error_line(command("train_voc.py", *flags, "--resume", alone))
        assert "another architecture: cls.1.weight is [5, 256, 1, 1] in the file" in line

    def test_resuming_with_other_settings_is_refused(self, trained, voc_root, tmp_path, command):
        folder = Path(shutil.copytree(trained, tmp_path / "models" / STEP))
        (folder / "metrics.json").unlink()
        before = snapshot(folder)
        flags = train_flags(voc_root, tmp_path, epochs=2, lr=0.5)
        line = error_line(command("train_voc.py", *flags, "--resume", "auto"))
        assert "optimizer.args.lr" in line and "trainer.epochs" in line
        assert snapshot(folder) == before

    def test_resuming_from_elsewhere_replaces_no_unfinished_step(
        self, trained, voc_root, tmp_path, command
    ):
        folder = Path(shutil.copytree(trained, tmp_path / "models" / STEP))
        (folder / "metrics.json").unlink()
        before = snapshot(folder)
        flags = train_flags(voc_root, tmp_path, epochs=1)
        line = error_line(command("train_voc.py", *flags, "--resume", trained / "last.pth"))
        assert "a checkpoint of its own" in line
        assert snapshot(folder) == before
        (folder / "last.pth").unlink()
        before = snapshot(folder)
        line = error_line(command("train_voc.py", *flags, "--resume", trained / "last.pth"))
        assert "a checkpoint of its own" in line
        assert snapshot(folder) == before

    @pytest.mark.parametrize("name", ["", "..", "a/b", "long" * 60])
    def test_a_name_that_no_folder_can_have(self, voc_root, tmp_path, command, name):
        flags = train_flags(voc_root, tmp_path, name=name)
        assert "--name" in error_line(command("train_voc.py", *flags))

    def test_doubts_without_pseudo_labels(self, voc_root, tmp_path, command):
        flags = [*train_flags(voc_root, tmp_path), "--ignore_thresh", "0.5", "--pseudo_labels", "off"]
        assert "--ignore_thresh needs pseudo labels" in error_line(command("train_voc.py", *flags))

    def test_an_output_folder_that_is_a_file(self, voc_root, tmp_path, command):
        (tmp_path / "file").write_text("kept")
        line = error_line(command("train_voc.py", *train_flags(voc_root, tmp_path / "file")))
        assert "cannot write the log" in line and (tmp_path / "file").read_text() == "kept"

    def test_model_without_training_state_cannot_be_resumed(self, trained, voc_root, tmp_path, command):
        state = read_checkpoint(trained / "last.pth")["state_dict"]
        torch.save({"state_dict": state}, tmp_path / "model.pth")
        flags = train_flags(voc_root, tmp_path / "saved", epochs=1)
        line = error_line(command("train_voc.py", *flags, "--resume", tmp_path / "model.pth"))
        assert "cannot be resumed from" in line
        assert not list((tmp_path / "saved").rglob("*.pth"))


class TestConfigurationFile:
    @pytest.fixture
    def write(self, tmp_path, voc_root):
        def call(**sections):
            path = tmp_path / "config.json"
            path.write_text(json.dumps(sections))
            return "-c", path, *train_flags(voc_root, tmp_path / "saved", epochs=1)

        return call

    def test_keys_without_meaning_are_accepted_with_one_warning(self, write, command):
        result = command(
            "train_voc.py",
            *write(
                test=True,
                mix_mask=True,
                data_loader={"args": {"val": {"cross_val": False}}},
                hyperparameter={"dkd_pos": 1, "dkd_neg": 2, "fc": 1, "fs": 0, "loss_lovasz": 0},
            ),
        )
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if "ignored keys" in line]
        assert len(lines) == 1
        for key in ("test", "mix_mask", "val.cross_val", "dkd_pos", "dkd_neg", "fc", "fs"):
            assert re.search(rf"\b{re.escape(key)}\b", lines[0]), key

    def test_unknown_key_suggests_the_nearest(self, write, command):
        line = error_line(command("train_voc.py", *write(trainer={"epoch": 3})))
        assert "unknown key trainer.epoch: did you mean epochs?" in line

    def test_iabn_sync_is_refused_by_name(self, write, command):
        line = error_line(command("train_voc.py", *write(arch={"args": {"norm_act": "iabn_sync"}})))
        assert "iabn_sync" in line and "bn_sync or bn" in line


class TestDistUrl:
    def test_a_flag_without_value_is_taken(self, voc_root, tmp_path, command):
        flags = train_flags(voc_root, tmp_path, epochs=1)
        result = command("train_voc.py", "--multiprocessing_distributed", "--dist_url", *flags)
        assert result.returncode == 0, result.stderr


def help_of(script):
    return run_script(script, "--help")


@pytest.mark.parametrize("script", ["train_voc.py", "eval_voc.py"])
def test_help_explains_every_flag_with_its_default(script):
    result = help_of(script)
    assert result.returncode == 0 and result.stderr == ""
    text = " ".join(result.stdout.split())
    flags = (
        "--data_root --epochs --ep --seed --mbce --kd --ac --learning_rate --lr --batch_size --bs "
        "--crop_size --backbone --backbone_weights --num_workers --replay --kd_mode --pos_weight "
        "--freeze_bn --mem_size --task_name --task_setting --task_step --name --save_dir --dist_url "
        "--multiprocessing_distributed --resume --test -c -d"
    )
    for flag in flags.split():
        assert re.search(rf"(?<![\w-]){flag}\b", text), flag
    assert "(default: 15-5)" in text and "(default: 512)" in text
