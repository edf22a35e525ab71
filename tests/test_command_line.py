"""The entry points as a user meets them: bad input, finished and interrupted steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.options import Config, EvalCall, TrainCall, read_train
from tests.helpers import PROJECT, error_line, run_script, snapshot, train_flags
from trainer import base
from utils.checkpoint import locked, read_checkpoint
from utils.config import options

STEP = "overlap_5-3_EIR/step_0"
CHECKPOINT = "checkpoint-epoch1.pth"


@pytest.fixture(scope="module")
def trained(voc_root, tmp_path_factory):
    """Folder of a finished step of one epoch, to be read only."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_script("train_voc.py", *train_flags(voc_root, folder, epochs=1))
    assert result.returncode == 0, result.stderr
    return folder / "models" / STEP


@pytest.fixture
def own_step(trained, tmp_path):
    """A copy of it, below tmp_path, that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "models" / STEP))


class TestTrainAndEvaluate:
    def test_outputs_of_a_step(self, trained):
        names = {path.name for path in trained.iterdir()}
        assert names - {".lock"} == {
            CHECKPOINT, "config.json", "last.pth", "made_from.json", "metrics.json"
        }  # fmt: skip
        log = trained.parents[2] / "log" / STEP
        assert (log / "log.txt").is_file() and (log / "metrics.jsonl").is_file()
        metrics = json.loads((trained / "metrics.json").read_text())
        for name, values in metrics.items():
            assert {"overall", "old", "new", "harmonic"} <= values.keys()
            assert values["new"] is None and values["harmonic"] is None
            assert ("by_class" in values) == (name != "Pixel_Accuracy")
        classes = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle"]
        assert list(metrics["Mean_Intersection_over_Union"]["by_class"]) == classes

    @pytest.mark.parametrize("score", [(), ("--score", "0.5")])
    def test_evaluation_repeats_the_reported_numbers(self, trained, tmp_path, command, score):
        output = tmp_path / "again.json"
        flags = ("-d", 0, "--test", "-r", trained / CHECKPOINT, "--output", output)
        result = command("eval_voc.py", *flags, *score)
        assert result.returncode == 0, result.stderr
        assert output.read_text() == (trained / "metrics.json").read_text()
        iou = json.loads(output.read_text())["Mean_Intersection_over_Union"]
        assert f"background       old{iou['by_class']['background']:9.2f}" in result.stdout

    def test_a_score_of_zero_predicts_no_background(self, trained, tmp_path, command):
        output = tmp_path / "zero.json"
        result = command("eval_voc.py", "-r", trained / CHECKPOINT, "--output", output, "--score", 0)
        assert result.returncode == 0, result.stderr
        found = json.loads(output.read_text())
        accuracy = found["Pixel_Accuracy_Class"]["by_class"]
        assert accuracy["background"] == 0 and max(accuracy.values()) > 0
        assert found["score"] == 0 and "score       0, which a prediction asked for" in result.stdout

    def test_a_file_of_the_familys_layout_is_evaluated(self, trained, voc_root, tmp_path, command):
        """With what its trainers keep beside the weights if that is data; objects are refused."""
        path, output = tmp_path / "family.pth", tmp_path / "family.json"
        state = read_checkpoint(trained / CHECKPOINT)["state_dict"]
        content = {
            "arch": "DeepLabV3",
            "epoch": 1,
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float32(0.01)}]},
            "monitor_best": np.float64(61.5),
        }
        torch.save(content, path)
        task = ("--task_name", "5-3", "--task_step", 0, "--task_setting", "overlap")
        flags = ("-r", path, "-c", PROJECT / "configs/config_voc.json", "--data_root", voc_root, *task)
        small = ("--backbone", "tiny", "--crop_size", 64, "--num_workers", 0)
        result = command("eval_voc.py", *flags, *small, "--output", output)
        assert result.returncode == 0, result.stderr
        assert output.read_text() == (trained / "metrics.json").read_text()
        torch.save({**content, "config": SimpleNamespace(epochs=60)}, path)
        line = error_line(command("eval_voc.py", *flags, *small))
        assert f"{path} holds objects besides data (types.SimpleNamespace)" in line

    def test_whole_images_are_evaluated_by_a_flag(self, trained, tmp_path, command):
        """The same numbers as by the configuration file; and no other ones without a word."""
        flag, file = tmp_path / "flag.json", tmp_path / "file.json"
        checkpoint = ("-r", trained / CHECKPOINT)
        result = command("eval_voc.py", *checkpoint, "--eval_crop", "off", "--output", flag)
        assert result.returncode == 0, result.stderr
        config = json.loads((trained / "config.json").read_text())
        config["data_loader"]["args"]["test"]["args"]["transform"] = False
        (tmp_path / "config.json").write_text(json.dumps(config))
        given = ("-c", tmp_path / "config.json", "--output", file)
        said = command("eval_voc.py", *checkpoint, *given)
        words = "was trained with other settings (--eval_crop on, now off)"
        assert said.returncode == 0 and words in said.stdout
        assert "other settings" not in command("eval_voc.py", *checkpoint).stdout
        (own := tmp_path / "own").mkdir()
        shutil.copy(checkpoint[1], own)
        (own / "config.json").write_text('{"arch": {"type": "UNet"}}')  # another program's
        foreign = ("-r", own / CHECKPOINT, "-c", tmp_path / "config.json")
        said = command("eval_voc.py", *foreign)
        assert said.returncode == 0 and "other settings" not in said.stdout
        assert flag.read_text() == file.read_text() != (trained / "metrics.json").read_text()

    def test_train_with_test_evaluates_only(self, trained, voc_root, command):
        before = snapshot(trained)
        flags = train_flags(voc_root, trained.parents[2], epochs=1)
        result = command("train_voc.py", *flags, "--test")
        assert result.returncode == 0, result.stderr
        assert "Mean_Intersection_over_Union" in result.stdout
        assert f"checkpoint  {trained / CHECKPOINT}" in result.stdout
        assert "other settings" not in result.stdout
        assert snapshot(trained) == before

    def test_train_with_test_says_where_the_step_is_another(
        self, own_step, voc_root, tmp_path, command
    ):
        (own_step / "metrics.json").unlink()
        flags = train_flags(voc_root, tmp_path, epochs=1, eval_crop="off")
        result = command("train_voc.py", *flags, "--test")
        assert result.returncode == 0, result.stderr
        words = "was trained with other settings (--eval_crop on, now off)"
        assert f"{own_step / CHECKPOINT} {words}" in result.stdout
        assert f"{own_step} is not finished: {CHECKPOINT} is the latest" in result.stdout
        config = json.loads((own_step / "config.json").read_text())
        config["data_loader"]["args"]["test"]["args"] |= {"masking_value": 255}
        dataset = config["data_loader"]["args"]["dataset"]
        dataset |= {"zero": "void", "val_labels": dataset["val_labels"][::-1], "highest_id": 30}
        (tmp_path / "config.json").write_text(json.dumps(config))
        config_flags = ("-c", tmp_path / "config.json", "--save_dir", tmp_path)
        result = command("train_voc.py", *config_flags, "--test")
        (line,) = [line for line in result.stdout.splitlines() if "with other settings" in line]
        changed = ["dataset.highest_id 20, now 30", "dataset.zero background, now void"]
        for words in (*changed, "dataset.val_labels", "test.args.masking_value 0, now 255"):
            assert f"data_loader.args.{words}" in line

    def test_the_results_of_a_step_are_no_place_for_others(self, own_step, tmp_path, command):
        before, output = snapshot(tmp_path), own_step / "metrics.json"
        flags = ("-r", own_step / CHECKPOINT, "--score", 0.9, "--output", output)
        assert f"{output} has the results of a step" in error_line(command("eval_voc.py", *flags))
        assert snapshot(tmp_path) == before

    def test_a_finished_step_is_not_trained_again(self, trained, voc_root, command):
        before = snapshot(trained)
        result = command("train_voc.py", *train_flags(voc_root, trained.parents[2], epochs=1))
        assert result.returncode == 0
        assert "is finished already" in result.stdout and "--overwrite" in result.stdout
        assert snapshot(trained) == before

    def test_a_step_that_an_older_version_finished_is_the_same_experiment(
        self, own_step, voc_root, tmp_path, command
    ):
        """Its config.json has the keys that have one possible value."""
        config = json.loads((own_step / "config.json").read_text())
        config["arch"]["type"] = "DeepLabV3"
        config["arch"]["args"]["output_stride"] = 16
        config["data_loader"]["args"]["train"]["args"]["transform"] = True
        config |= {"n_gpu": 1, "evaluator": {"type": "Evaluator", "args": {}}, "test": False}
        (own_step / "config.json").write_text(json.dumps(config))
        result = command("train_voc.py", *train_flags(voc_root, tmp_path, epochs=1))
        assert result.returncode == 0 and "is finished already" in result.stdout
        assert command("eval_voc.py", "-r", own_step / CHECKPOINT).returncode == 0

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"lr": 0.02}, "--lr 0.01, now 0.02"),
            ({"epochs": 3}, "--epochs 1, now 3"),
            ({"bs": 2}, "a batch of 4 images, not 2, over all processes"),
        ],
    )
    def test_a_finished_step_with_other_settings_is_refused(
        self, trained, voc_root, command, changes, key
    ):
        before = snapshot(trained)
        flags = train_flags(voc_root, trained.parents[2], **{"epochs": 1, **changes})
        line = error_line(command("train_voc.py", *flags))
        assert f"({key})" in line and "--overwrite" in line
        assert snapshot(trained) == before

    def test_overwrite_trains_anew(self, own_step, voc_root, tmp_path, command):
        (own_step / "checkpoint-epoch7.pth").write_bytes(b"of a longer run")
        (own_step.parent / "step_1").mkdir()
        flags = train_flags(voc_root, tmp_path, epochs=1, seed=2)
        result = command("train_voc.py", *flags, "--overwrite")
        assert result.returncode == 0, result.stderr
        assert "epoch 1/1: " in result.stdout
        assert "step_1 was trained from the step that is trained anew here" in result.stdout
        assert json.loads((own_step / "config.json").read_text())["seed"] == 2
        assert [path.name for path in own_step.glob("checkpoint*")] == [CHECKPOINT]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"mem_size": 5, "bs": 1}, "cannot train on one image"),
            ({"accumulate": 3}, "cannot train on one image"),
            ({"bs": 200, "accumulate": 100}, "cannot train on one image"),  # there are fewer images
            ({"backbone_weights": "nowhere.pth"}, "no ImageNet weights for the backbone tiny"),
            ({"data_root": "nowhere"}, "nowhere does not exist"),
            ({"task_name": "5-4"}, "unknown task '5-4'"),
            (
                {"ignore_thresh": 0.5, "pseudo_labels": "off"},
                "--ignore_thresh works with --pseudo_labels crop",
            ),
        ],
        ids=str,
    )
    def test_an_overwrite_that_is_refused_leaves_the_finished_step_as_it_was(
        self, own_step, voc_root, tmp_path, command, changes, words
    ):
        before = snapshot(tmp_path / "models")
        flags = train_flags(voc_root, tmp_path, **{"epochs": 1, **changes})
        assert words in error_line(command("train_voc.py", *flags, "--overwrite"))
        assert snapshot(tmp_path / "models") == before

    @pytest.mark.parametrize(
        "name",
        [
            "config.json", "made_from.json", "metrics.json", "last.pth", "model_best.pth", CHECKPOINT,
            "log.txt", "metrics.jsonl", "memory", "pseudo_labels", "memory.unfinished",
        ],
    )  # fmt: skip
    def test_an_overwrite_is_refused_where_a_folder_lies_in_place_of_a_file_or_a_file_of_a_folder(
        self, own_step, voc_root, tmp_path, command, name
    ):
        place = (tmp_path / "log" / STEP if name in ("log.txt", "metrics.jsonl") else own_step) / name
        if "." in name and name != "memory.unfinished":
            place.unlink(missing_ok=True)
            place.mkdir(parents=True)
        else:
            place.write_text("kept")
        before = snapshot(tmp_path)
        line = error_line(command("train_voc.py", *train_flags(voc_root, tmp_path), "--overwrite"))
        assert str(place) in line and "move it away" in line
        assert snapshot(tmp_path) == before

    def test_an_overwrite_by_too_many_processes_leaves_the_finished_step_as_it_was(
        self, own_step, voc_root, tmp_path, command, monkeypatch
    ):
        before = snapshot(own_step)
        flags = train_flags(voc_root, tmp_path, epochs=1)
        with monkeypatch.context() as patch:
            patch.setattr(base, "world_size", lambda: 100)
            line = error_line(command("train_voc.py", *flags, "--overwrite"))
        assert "training images cannot be shared by 100 processes" in line
        assert snapshot(own_step) == before
        assert "is finished already" in command("train_voc.py", *flags).stdout

    @pytest.mark.parametrize("name", [CHECKPOINT, "config.json", "README.md", "."])
    def test_an_evaluation_writes_over_nothing_but_numbers(self, own_step, tmp_path, command, name):
        (own_step / "README.md").write_text("kept")
        before, output = snapshot(tmp_path), own_step / name
        flags = ("-r", own_step / CHECKPOINT, "--output", output)
        assert f"cannot write {output}: what is there" in error_line(command("eval_voc.py", *flags))
        assert snapshot(tmp_path) == before


class TestInterruptedStep:
    def test_resume_after_a_kill_gives_the_weights_of_an_uninterrupted_run(
        self, voc_root, tmp_path, command
    ):
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

        resumed = command("train_voc.py", *killed, "--resume", "auto")
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed after epoch" in resumed.stdout
        whole = command("train_voc.py", *train_flags(voc_root, tmp_path / "whole", **settings))
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

    def test_a_step_killed_before_its_evaluation_is_finished_on_resuming(
        self, trained, own_step, voc_root, tmp_path, command
    ):
        (own_step / "metrics.json").write_text('{"Pixel_Accuracy": {')  # torn: the step is unfinished
        (own_step / CHECKPOINT).unlink()
        flags = train_flags(voc_root, tmp_path, epochs=1)
        line = error_line(command("train_voc.py", *flags))
        assert "unfinished" in line and "--resume auto" in line and "--overwrite" in line
        assert command("train_voc.py", *flags, "--resume", "auto").returncode == 0
        assert (own_step / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()
        one, other = (read_checkpoint(f / CHECKPOINT)["state_dict"] for f in (trained, own_step))
        assert all(torch.equal(one[key], other[key]) for key in one)

    def test_resuming_with_other_settings_is_refused(self, own_step, voc_root, tmp_path, command):
        (own_step / "metrics.json").unlink()
        before = snapshot(own_step)
        flags = train_flags(voc_root, tmp_path, epochs=2, lr=0.5)
        line = error_line(command("train_voc.py", *flags, "--resume", "auto"))
        assert "(--lr 0.01, now 0.5; --epochs 1, now 2)" in line
        assert snapshot(own_step) == before

    def test_a_step_that_another_process_trains_is_left_alone(
        self, own_step, voc_root, tmp_path, command
    ):
        with locked(own_step, "busy"):
            before = snapshot(own_step)
            line = error_line(command("train_voc.py", *train_flags(voc_root, tmp_path), "--overwrite"))
            assert "another process is training" in line
            assert snapshot(own_step) == before

    @pytest.mark.parametrize(
        "gone", [("metrics.json",), ("metrics.json", "last.pth", "made_from.json")], ids=str
    )
    def test_resuming_from_elsewhere_replaces_no_checkpoint(
        self, trained, own_step, voc_root, tmp_path, command, gone
    ):
        for name in gone:
            (own_step / name).unlink()
        before = snapshot(own_step)
        flags = train_flags(voc_root, tmp_path, epochs=1)
        line = error_line(command("train_voc.py", *flags, "--resume", trained / "last.pth"))
        assert "a checkpoint of its own" in line
        if "last.pth" in gone:
            assert "that was not trained here" in error_line(command("train_voc.py", *flags))
        assert snapshot(own_step) == before


class TestBadCheckpoints:
    """Refused by train_voc.py --resume and by eval_voc.py, with nothing touched."""

    @pytest.fixture(params=["torn", "no training state"])
    def bad(self, request, trained, tmp_path):
        path = tmp_path / "bad" / "checkpoint.pth"
        path.parent.mkdir()
        if request.param == "torn":
            path.write_bytes((trained / "last.pth").read_bytes()[:-1])
        else:
            torch.save({"state_dict": read_checkpoint(trained / "last.pth")["state_dict"]}, path)
        return path

    def test_resume(self, bad, voc_root, tmp_path, command):
        flags = train_flags(voc_root, tmp_path / "saved", epochs=1)
        line = error_line(command("train_voc.py", *flags, "--resume", bad))
        assert str(bad) in line and ("is damaged" in line or "cannot be resumed from" in line)
        assert not list((tmp_path / "saved").rglob("*.pth"))

    def test_a_torn_checkpoint_is_not_evaluated(self, trained, tmp_path, command):
        bad, output = tmp_path / "torn.pth", tmp_path / "metrics.json"
        bad.write_bytes((trained / "last.pth").read_bytes()[:-1])
        flags = ("-r", bad, "-c", trained / "config.json", "--output", output)
        assert f"{bad} is damaged" in error_line(command("eval_voc.py", *flags))
        assert not output.exists()

    def test_a_torn_last_checkpoint_leaves_the_folder_alone(
        self, own_step, voc_root, tmp_path, command
    ):
        (own_step / "metrics.json").unlink()
        (own_step / "last.pth").write_bytes((own_step / "last.pth").read_bytes()[:-5000])
        before = snapshot(own_step)
        flags = train_flags(voc_root, tmp_path, epochs=1)
        assert "is damaged" in error_line(command("train_voc.py", *flags, "--resume", "auto"))
        assert snapshot(own_step) == before

    def test_another_task_is_named(self, trained, voc_root, tmp_path, command):
        alone = Path(shutil.copy(trained / "last.pth", tmp_path / "alone.pth"))
        flags = train_flags(voc_root, tmp_path, epochs=1, task_name="15-5")
        line = error_line(command("train_voc.py", *flags, "--resume", alone))
        assert f"{alone} learned 5 classes, and step 0 of 15-5 has 15: give the --task_name" in line


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
        result = run_script("eval_voc.py", "-r", tmp_path / "no.pth")
        assert "no checkpoint at" in error_line(result)
        assert not saved.exists()

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

    def test_an_output_folder_that_is_a_file(self, voc_root, tmp_path, command):
        (tmp_path / "file").write_text("kept")
        line = error_line(command("train_voc.py", *train_flags(voc_root, tmp_path / "file")))
        assert "cannot write" in line and (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--task_name 7-4", "unknown task '7-4'"),
            ("--task_step 6", "has no step 6: its steps are 0 to 5"),
            ("--task_step 1", "step 0 is not finished"),
            ("--task_setting both", "allowed: overlap, disjoint, sequential"),
            ("--epochs many", "--epochs must be an integer, not 'many'"),
            ("--epochs 0", "--epochs is 0; it must be at least 1"),
            ("--crop_size 999999999", "--crop_size is 999999999; it must be at most 10000"),
            ("--crop_size 100000", "it must be at most 10000"),
            ("--lr -1", "--lr is -1.0; it must be at least 0"),
            ("--lr nan", "--lr is nan"),
            ("--lr inf", "--lr is inf"),
            (
                "--pos_weight 1e308",
                "--pos_weight is 1e+308; it must be finite, also in single precision",
            ),
            ("--seed ٣", "--seed must be an integer, not '٣'"),
            ("--lr ٣", "--lr must be a number, not '٣'"),
            (f"--resume {'long' * 2000}", "longlong"),
            ("--resume a\udc80", "-r is 'a\\udc80'; a path must be printable"),
            ("--prev_checkpoint ~nouser/x", "there is no such user"),
            ("--backbone_weights=", "--backbone_weights needs a value"),
            ("--bs 2.5", "--bs must be an integer"),
            ("--bs=", "--bs needs a value"),
            ("--backbone vgg", "allowed: resnet101, resnet50, tiny, timm/NAME"),
            ("--pseudo_thresh 1.5", "at most 1"),
            ("--fusion maybe", "--fusion is 'maybe'; allowed: on, off"),
            ("--no_such_flag", "--no_such_flag"),
            ("--seed --", "--help lists the flags"),
            ("--seed", "--help lists the flags"),
            ("--name=", "--name needs a value"),
            ("--name ..", "--name is '..'; it must be a name that a folder can have"),
            ("--name a/b", "it must be a name that a folder can have"),
            (f"--name {'long' * 60}", "it must be a name that a folder can have"),
            ("--name a\nb", "it must be printable, in one line"),
            ("-d cuda", "give GPU indices"),
            ("-d ²", "-d is '²'; give GPU indices"),
            ("-d=", "-d needs a value"),
            ("-r=", "-r needs a value"),
            ("-c nowhere.json", "cannot read nowhere.json"),
            ("--overwrite --resume auto", "exclude each other"),
            (
                "--ignore_thresh 0.5 --pseudo_labels off",
                "--ignore_thresh works with --pseudo_labels crop only",
            ),
            ("--resume nowhere.pth", "no checkpoint at nowhere.pth"),
            ("--test", "nothing to evaluate"),
        ],
        ids=lambda text: text[:20],
    )
    def test_flags(self, refused, flags, words):
        # "-r=" stands for an empty word after the flag, which nothing else here can express
        short = re.fullmatch("(--?[a-z_]+)=", flags)
        assert words in refused(*([short[1], ""] if short else flags.split(" ")))

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ((), "give the checkpoint to evaluate with -r FILE"),
            (("-r", ""), "give the checkpoint to evaluate with -r FILE"),
            (("-c", "configs/config_voc.json"), "give the checkpoint to evaluate with -r FILE"),
            (("-r", "nowhere.pth"), "no checkpoint at nowhere.pth"),
            (("-r", "README.md"), "no config.json beside README.md: give the configuration with -c"),
            (("-r", "x.pth", "-c", "configs/config_voc.json", "--score", "1.01"), "at most 1"),
            (("-r", "x.pth", "-c", "configs/config_voc.json", "--score", "-0.1"), "at least 0"),
            (("-r", "x.pth", "-c", "configs/config_voc.json", "--score", "nan"), "must be finite"),
            (("-r", "long" * 2000), "File name too long"),
            (
                ("-r", "x.pth", "-c", "configs/config_voc.json", "--output", "a\udc80"),
                "--output is 'a\\udc80'; a path must be",
            ),
        ],
    )
    def test_flags_of_the_evaluation(self, command, monkeypatch, flags, words):
        monkeypatch.chdir(PROJECT)
        assert words in error_line(command("eval_voc.py", *flags))


class TestConfigurationFile:
    @pytest.fixture
    def with_file(self, tmp_path, voc_root, command):
        def call(text):
            path = tmp_path / "config.json"
            path.write_text(text)
            return command(
                "train_voc.py", "-c", path, *train_flags(voc_root, tmp_path / "saved", epochs=1)
            )

        return call

    def test_keys_without_meaning_are_accepted_with_one_warning(self, with_file):
        hyperparameter = {"dkd_pos": 1, "dkd_neg": 2, "fc": 1, "fs": 0, "loss_lovasz": 0}
        result = with_file(
            json.dumps({"test": True, "hyperparameter": hyperparameter, "evaluator": {}})
        )
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stdout.splitlines() if "ignored keys" in line]
        dkd = [f"hyperparameter.dkd_{part} (of --method dkd)" for part in ("pos", "neg")]
        others = [f"hyperparameter.{name}" for name in ("fc", "fs", "loss_lovasz")]
        keys = ", ".join(["test", *dkd, *others])
        assert line.endswith(f": {keys}")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('{"trainer": {"epoch": 3}}', "unknown key trainer.epoch: did you mean epochs?"),
            ('{"arch": {"args": {"norm_act": "iabn_sync"}}}', "choose bn_sync or bn"),
            ('{"optimizer": {"args": {"lr": ' + "9" * 400 + "}}}", "it must be finite"),
            ("[" * 100_000, "is not valid JSON"),
            ('{"trainer": {"save_dir": ""}}', "trainer.save_dir is ''; give a path"),
            ('{"data_loader": {"args": {"task": {"idxs_path": "a\\u0000"}}}}', "must be printable"),
            (
                '{"data_loader": {"args": {"dataset": {"train_images": "{}{0.x}.jpg"}}}}',
                "dataset.train_images is '{}{0.x}.jpg'; give paths in which {} stands for the id",
            ),
        ],
        ids=lambda text: text[:20],
    )
    def test_a_bad_file_is_refused(self, with_file, text, words):
        assert words in error_line(with_file(text))


@pytest.mark.parametrize("flags", ["--replay image", "--surroundings 0.25"])
def test_void_for_hidden_classes_is_refused_where_background_is_stored(tmp_path, command, flags):
    path = tmp_path / "config.json"
    arguments = {"train": {"args": {"masking_value": 255}}}
    path.write_text(json.dumps({"data_loader": {"args": arguments}}))
    asked = ["-c", str(path), "--task_step", "1"]
    line = error_line(command("train_voc.py", *asked, *flags.split()))
    assert "masking_value 255 is not for memories that store background" in line
    for fine in ([], ["--task_step", "0", *flags.split()], ["--replay", "none"]):
        assert read_train([*asked, *fine])[0].data.train.args.masking_value == 255


def test_a_dist_url_without_value_is_taken(voc_root, tmp_path, command):
    flags = train_flags(voc_root, tmp_path, epochs=1)
    result = command("train_voc.py", "--multiprocessing_distributed", "--dist_url", *flags)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("script", "call"), [("train_voc.py", TrainCall), ("eval_voc.py", EvalCall)])
def test_help_explains_every_flag_with_its_default(command, script, call):
    result = command(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    text = " ".join(result.stdout.split())
    family = (
        "--data_root --epochs --ep --seed --mbce --kd --ac --learning_rate --lr --batch_size --bs "
        "--crop_size --backbone --backbone_weights --num_workers --replay --kd_mode --pos_weight "
        "--freeze_bn --mem_size --task_name --task_setting --task_step --name --save_dir --dist_url "
        "--multiprocessing_distributed --resume --test -c -d"
    )
    declared = [flag for cls in (call, Config) for o in options(cls) for flag in o.metadata["flags"]]
    assert set(family.split()) <= set(declared)
    for flag in declared:
        assert re.search(rf"(?<![\w-]){flag}\b", text), flag
    assert "(default: 15-5)" in text and "(default: 512)" in text
