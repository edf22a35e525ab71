"""Configuration: the family's shape, types and ranges, flags on top, and what a call asks for."""

import json

import pytest

from configs.options import ACCEPTED, DKD_ALONE, Config, load_config, read_eval, read_train
from tests.helpers import PROJECT
from utils.config import differences, options, put
from utils.errors import UserError

HARMLESS = {key: (allowed or [True])[0] for key, allowed in ACCEPTED.items()}
HARMLESS |= dict.fromkeys(DKD_ALONE, 5.0)


def write(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def refusal(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
    return str(refused.value)


def with_flags(*flags, file=None):
    """The configuration of a call with these flags, on top of a file or of the defaults."""
    files = ["-c", str(file)] if file else []
    return read_train([*files, *map(str, flags)])[0]


class TestFiles:
    def test_the_papers_settings(self):
        config, ignored = load_config(PROJECT / "configs" / "config_voc.json")
        assert ignored == []
        assert config.arch.args.backbone == "resnet101"
        assert config.trainer.epochs == 60 and config.seed == 1 and config.use_amp
        assert config.optimizer.args.lr == 1e-3 and config.optimizer.args.weight_decay == 1e-4
        assert config.optimizer.args.momentum == 0.9 and config.optimizer.args.nesterov
        assert config.lr_scheduler.args.power == 0.9
        assert config.data.train.batch_size == 32 and config.data.memory.mem_size == 100
        assert config.hyperparameter.kd == 5 and config.hyperparameter.pseudo_thresh == 0.7
        assert config.hyperparameter.ac == 0
        crops = {s.args.transform_args.crop_size for s in (config.data.train, config.data.test)}
        assert crops == {512}

    def test_the_defaults_are_the_papers_settings(self):
        assert load_config(PROJECT / "configs" / "config_voc.json")[0] == Config()

    def test_the_variant_differs_in_the_mixing_only(self):
        names = ("config_voc.json", "config_voc_plus.json")
        paper, plus = (load_config(PROJECT / "configs" / name)[0] for name in names)
        paper.task.step = plus.task.step = 1
        assert [*differences(paper, plus)] == ["name", "hyperparameter.paste.fusion"]
        assert not plus.hyperparameter.paste.fusion

    def test_what_is_written_is_read_back(self, tmp_path):
        config = with_flags("--lr", 0.5, "--task_name", "15-1", "--freeze_bn", "--max_upscale", 2)
        again, ignored = load_config(write(tmp_path, config.to_dict()))
        assert again == config and ignored == []
        assert differences(again, config) == {}

    def test_keys_that_former_versions_wrote_are_accepted(self, tmp_path):
        """A config.json with the keys that have one possible value is the same experiment."""
        content = Config().to_dict()
        for path, value in HARMLESS.items():
            *parents, key = path.split(".")
            inner = content
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[key] = value
        config, ignored = load_config(write(tmp_path, content))
        assert config == Config() and differences(config, Config()) == {}
        meaningless = (None, (0,), (False,))
        assert sorted(ignored) == sorted(p for p, allowed in ACCEPTED.items() if allowed in meaningless)

    @pytest.mark.parametrize(
        ("key", "value", "allowed"),
        [
            ("arch.type", "DeepLabV2", '"DeepLabV3"'),
            ("arch.args.output_stride", 8, "16"),
            ("optimizer.type", "Adam", '"SGD"'),
            ("lr_scheduler.type", None, '"PolyLR"'),
            ("data_loader.type", ["VOC"], '"VOCIncrementalDataLoader"'),
            ("data_loader.args.train.args.transform", False, "true"),
            ("data_loader.args.val.cross_val", True, "false"),
            ("hyperparameter.loss_lovasz", 1, "0"),
            ("evaluator", {"type": "Other"}, '{"type": "Evaluator", "args": {}}'),
        ],
    )
    def test_other_values_of_those_keys_are_refused(self, tmp_path, key, value, allowed):
        message = refusal(tmp_path, nested(key, value))
        assert f": {key} is {json.dumps(value)}; allowed: {allowed}, or leave it out" in message

    @pytest.mark.parametrize(
        ("key", "nearest"),
        [
            ("trainer.epoch", "epochs"),
            ("optimizer.args.learning_rate", None),
            ("data_loader.args.task.nmae", "name"),
            ("hyperparameter.posweight", "pos_weight"),
            ("sed", "seed"),
        ],
    )
    def test_unknown_keys_suggest_the_nearest(self, tmp_path, key, nearest):
        message = refusal(tmp_path, nested(key, 1))
        assert f"unknown key {key}: " in message
        assert (f"did you mean {nearest}?" if nearest else "known here: lr, ") in message

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("seed", "1", "seed must be an integer, not"),
            ("seed", 1.0, "must be an integer"),
            ("seed", True, "must be an integer"),
            ("seed", None, "must be an integer, not null"),
            ("use_amp", 1, "use_amp must be true or false, not 1"),
            ("optimizer.args.lr", "fast", "optimizer.args.lr must be a number"),
            ("optimizer.args.lr", False, "must be a number"),
            ("optimizer.args.lr", float("nan"), "optimizer.args.lr is nan; it must be finite"),
            ("optimizer.args.lr", float("inf"), "it must be finite"),
            ("optimizer.args.lr", 10**400, "lr is a number of 401 digits; it must be finite"),
            ("name", 3, "name must be a string"),
            ("name", "two\nlines", r"name is 'two\nlines'; it must be printable, in one line"),
            ("trainer", 3, "trainer must be a JSON object, not 3"),
            ("metrics", "mIoU", "metrics must be a list"),
            ("metrics", ["mIoU"], "metrics has 'mIoU'; allowed: Pixel_Accuracy"),
            ("trainer.epochs", 0, "trainer.epochs is 0; it must be at least 1"),
            ("optimizer.args.momentum", 1.5, "it must be at most 1"),
            ("arch.args.backbone", "vgg", "allowed: resnet101, resnet50, tiny"),
            (
                "arch.args.norm_act",
                "iabn_sync",
                "which is not used here: choose bn_sync or bn",
            ),
            ("arch.args.norm_act", "gn", "allowed: bn_sync, bn"),
            ("data_loader.args.train.args.masking_value", 7, "allowed: 0, 255"),
            ("hyperparameter.kd", -1, "hyperparameter.kd is -1.0; it must be at least 0"),
        ],
    )
    def test_wrong_types_and_values_name_the_key_and_what_is_allowed(self, tmp_path, key, value, words):
        assert words in refusal(tmp_path, nested(key, value))

    def test_integers_serve_as_numbers(self, tmp_path):
        config, _ = load_config(write(tmp_path, {"hyperparameter": {"pos_weight": 2}}))
        assert type(config.hyperparameter.pos_weight) is float

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[1]", "3", '{"seed": 1,}', "\x00", "[" * 100_000, '{"trainer":' * 100_000],
        ids=lambda text: text[:12],
    )
    def test_files_that_are_no_json_object(self, tmp_path, text):
        refusal(tmp_path, text)

    def test_a_key_that_stands_twice(self, tmp_path):
        text = '{"trainer": {"epochs": 3, "save_period": 1, "epochs": 5}}'
        assert 'the key "epochs" stands twice in one object' in refusal(tmp_path, text)
        load_config(write(tmp_path, {"name": "epochs", "trainer": {"epochs": 3}}))

    @pytest.mark.parametrize("key", ["trainer.verbosity", "optimizer.args.lr", "name"])
    @pytest.mark.parametrize("digits", [400, 5000])
    def test_numbers_of_many_digits_are_refused(self, tmp_path, key, digits):
        refusal(tmp_path, json.dumps(nested(key, "@")).replace('"@"', "9" * digits))

    def test_missing_file_and_folder(self, tmp_path):
        for path in (tmp_path / "nowhere.json", tmp_path):
            with pytest.raises(UserError, match="cannot read "):
                load_config(path)


class TestFlags:
    def test_both_forms_set_the_same_option(self):
        assert with_flags("--bs", 3).data.train.batch_size == 3
        assert with_flags("--batch_size", 3).data.train.batch_size == 3
        assert with_flags("--ep", 3).trainer.epochs == with_flags("--epochs", 3).trainer.epochs == 3
        assert with_flags("--lr", "1e-4") == with_flags("--learning_rate", "0.0001")

    def test_crop_size_sets_all_splits(self):
        data = with_flags("--crop_size", 96).data
        assert {s.args.transform_args.crop_size for s in (data.train, data.val, data.test)} == {96}

    def test_switches_need_no_value(self):
        config = with_flags("--freeze_bn", "--multiprocessing_distributed")
        assert config.arch.args.freeze_all_bn and config.multiprocessing_distributed

    @pytest.mark.parametrize("value", [(), ("",)])
    def test_dist_url_may_come_without_a_value(self, value):
        config = with_flags("--dist_url", *value, "--name", "x")
        assert config.dist_url is None and config.name == "x"
        assert with_flags("--dist_url", "tcp://a:1").dist_url == "tcp://a:1"

    def test_none_takes_an_option_back(self, tmp_path):
        path = write(tmp_path, {"hyperparameter": {"ignore_thresh": 0.5, "paste": {"max_upscale": 2}}})
        config = with_flags("--ignore_thresh", "none", "--max_upscale", "none", file=path)
        assert config == Config()

    def test_two_configs_do_not_share_their_parts(self):
        with_flags("--lr", 9)
        Config().metrics.clear()
        assert Config().optimizer.args.lr == 1e-3 and len(Config().metrics) == 3

    def test_flags_override_the_file_and_others_leave_it(self, tmp_path):
        path = write(tmp_path, {"trainer": {"epochs": 7}, "seed": 3})
        config, call = read_train(["-c", str(path), "--epochs", "9"])
        assert config.trainer.epochs == 9 and config.seed == 3
        config.trainer.epochs, config.seed = Config().trainer.epochs, Config().seed
        assert config == Config() and not call.overwrite and call.resume is None

    def test_an_evaluation_takes_its_settings_from_beside_the_checkpoint(self, tmp_path):
        """But for how the processes of the training were started."""
        (tmp_path / "c.pth").touch()
        started = {"world_size": 4, "rank": 2, "dist_url": "tcp://a:1", "seed": 7}
        (tmp_path / "config.json").write_text(json.dumps(started))
        config, call = read_eval(["-r", str(tmp_path / "c.pth"), "--crop_size", "96"])
        assert (config.world_size, config.rank, config.dist_url, config.seed) == (1, 0, None, 7)
        assert config.data.test.args.transform_args.crop_size == 96 and call.score == 0.5
        asked = ["-r", str(tmp_path / "c.pth"), "-c", str(tmp_path / "config.json")]
        assert read_eval(asked)[0].world_size == 4


class TestExperiment:
    def test_places_and_workers_make_no_other_experiment(self):
        config = Config()
        for option in options(Config):
            if option.metadata["incidental"]:
                put(config, option.path, "other")
        assert differences(Config(), config) == {}
        changed = with_flags("--num_workers", 0, "--data_root", "x", "--save_dir", "y")
        assert differences(Config(), changed) == {}

    def test_settings_do(self):
        changed = with_flags("--lr", 3, "--pos_weight", 2)
        assert differences(Config(), changed) == {
            "optimizer.args.lr": "--lr 0.001, now 3.0",
            "hyperparameter.pos_weight": "--pos_weight 1.0, now 2.0",
        }
        crops = differences(Config(), with_flags("--crop_size", 96, "--eval_crop", "off"))
        words = {"--crop_size 512, now 96", "--eval_crop on, now off"}
        assert len(crops) == 5 and {*crops.values()} == words

    def test_but_for_those_without_effect(self):
        """So the methods of an experiment share a step 0, whatever memory they have later."""
        flags = ("--mem_size", 50, "--replay", "image", "--kd", 3, "--fusion", "off")
        assert differences(with_flags("--task_step", 0), with_flags(*flags)) == {}
        later = ("--task_step", 1)
        names = {
            words.split()[0]
            for words in differences(with_flags(*later), with_flags(*later, *flags)).values()
        }
        assert names == {"--mem_size", "--replay", "--kd"}  # and no fusion where nothing is pasted
        weights = ("--backbone_weights", "x.pth")
        assert differences(with_flags(*later), with_flags(*later, *weights)) == {}
        assert [*differences(with_flags(), with_flags(*weights))] == ["arch.args.backbone_weights"]

    @pytest.mark.parametrize(
        "flags",
        [
            ("--kd", 0, "--kd_mode", "none"),
            ("--kd", 0, "--rskd_region", "all"),
            ("--fusion", "off", "--lambda_min", 0.5),
            ("--pseudo_labels", "off", "--pseudo_thresh", 0.5),
            ("--replay", "none", "--mem_size", 5),
        ],
    )
    def test_what_switches_others_off_counts_itself(self, flags):
        plain, other = with_flags("--task_step", 1), with_flags("--task_step", 1, *flags)
        assert differences(plain, other) and differences(other, plain)

    def test_options_without_a_flag_count_where_they_are_used(self):
        paths = {"hyperparameter.paste.cell": 100, "hyperparameter.paste.beta": 0.4}

        def changed(*flags):
            config = with_flags(*flags)
            for path, value in paths.items():
                put(config, path, value)
            return [*differences(with_flags(*flags), config)]

        assert changed("--task_step", 0) == changed("--task_step", 1, "--replay", "image") == []
        assert changed("--task_step", 1, "--fusion", "off") == ["hyperparameter.paste.cell"]
        assert changed("--task_step", 1) == [*paths]
        paths = {"data_loader.args.test.batch_size": 1, "arch.args.backbone_pretrained": False}
        assert changed("--task_step", 1) == []
        assert changed("--task_step", 0) == ["arch.args.backbone_pretrained"]

    def test_fill_ins_count_without_positions(self):
        later = ("--task_step", 1, "--position", "off")
        plain, other = with_flags(*later), with_flags(*later, "--fill_in", "none")
        assert differences(plain, other) and differences(other, plain)

    def test_the_order_of_the_classes_does(self, tmp_path):
        classes = {"dog": 2, "cat": 1, "cow": 3}
        configs = []
        for names in (classes, sorted(classes)):
            dataset = {"name": "x", "classes": {name: classes[name] for name in names}}
            configs.append(
                load_config(write(tmp_path, {"data_loader": {"args": {"dataset": dataset}}}))[0]
            )
        path = "data_loader.args.dataset.classes"
        assert [*differences(*configs)] == [path] and differences(configs[0], configs[0]) == {}

    def test_folder_of_a_step(self):
        config = with_flags("--save_dir", "_saved_voc", "--task_name", "5-3", "--task_step", 2)
        assert str(config.step_dir()) == "_saved_voc/models/overlap_5-3_EIR/step_2"
        assert str(config.step_dir(1, "log")) == "_saved_voc/log/overlap_5-3_EIR/step_1"


DKD = ["--method", "dkd", "--ac", "1"]


class TestDKD:
    """The second method: its keys of the family's files, and what it cannot be without."""

    @pytest.mark.parametrize("by_flag", [True, False])
    def test_its_weights_are_read_with_it_and_ignored_without(self, tmp_path, by_flag):
        content = {"hyperparameter": {"dkd_pos": 2, "dkd_neg": 3, "ac": 0.5}}
        file = write(tmp_path, content if by_flag else {**content, "method": "dkd"})
        flags = ["-c", str(file), *(["--method", "dkd"] if by_flag else [])]
        config, call = read_train(flags)
        weights = config.hyperparameter
        assert (weights.dkd_pos, weights.dkd_neg, weights.ac) == (2, 3, 0.5) and call.ignored == []
        written = load_config(write(tmp_path, config.to_dict()))[0]
        assert written == config and differences(written, config) == {}

        config, call = read_train([*flags, "--method", "eir"])
        weights = config.hyperparameter
        assert (weights.dkd_pos, weights.dkd_neg, weights.ac) == (5, 5, 0.5)
        assert call.ignored == [f"{key} (of --method dkd)" for key in DKD_ALONE]
        assert load_config(write(tmp_path, config.to_dict())) == (config, [])

    def test_its_configuration_is_the_papers(self):
        config, call = read_train(["-c", str(PROJECT / "configs" / "config_voc_dkd.json")])
        weights = config.hyperparameter
        names = ("mbce", "kd", "dkd_pos", "dkd_neg", "ac")
        assert [getattr(weights, name) for name in names] == [1, 5, 5, 5, 1]
        assert config.method == "dkd" and config.data.memory.replay == "none" and call.ignored == []
        assert [*differences(Config(), config)] == ["name", "method", "hyperparameter.ac"]

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--method", "dkd"], "an auxiliary one.*give --ac 1"),
            ([*DKD, "--task_step", "1"], "knows no --replay eir: give --replay none"),
            ([*DKD, "--task_step", "1", "--replay", "instance"], "knows no --replay instance"),
            (["--method", "ssul"], "allowed: eir, dkd|invalid choice|'ssul'"),
        ],
    )
    def test_what_it_cannot_be_is_refused(self, flags, words):
        with pytest.raises(UserError, match=words):
            read_train(flags)


class TestFlagsWithoutEffect:
    """No flag that was given is without effect in silence."""

    @pytest.mark.parametrize(
        ("flags", "unused"),
        [
            (["--task_step", "0", "--mem_size", "5", "--kd", "1"], ["--mem_size", "--kd"]),
            (["--task_step", "1", "--mem_size", "5", "--kd", "1"], []),
            (["--task_step", "1", "--replay", "image", "--pastes", "2"], ["--pastes"]),
            (["--task_step", "1", "--replay", "none", "--mem_size", "5"], ["--mem_size"]),
            (["--task_step", "1", "--fusion", "off", "--lambda_min", "0.5"], ["--lambda_min"]),
            (["--task_step", "1", "--kd_mode", "plain", "--rskd_region", "all"], ["--rskd_region"]),
            (["--task_step", "1", "--pseudo_labels", "off", "--pseudo_thresh", "0.6"],
             ["--pseudo_thresh"]),
            (["--task_step", "1", "--backbone_weights", "f.pth"], ["--backbone_weights"]),
            (["--task_step", "1", "--class_combination", "off", "--fill_in", "none"], ["--fill_in"]),
            (["--task_step", "1", "--mem_size", "0", "--pastes", "2"], ["--pastes"]),
            (["--task_step", "1", "--mem_size", "0", "--surroundings", "0.2"], ["--surroundings"]),
            (["--task_step", "1", "--position", "off", "--fill_in", "next"], ["--fill_in"]),
            (["--task_step", "1", "--position", "off", "--fill_in", "none"], []),
            (["--task_step", "1", "--mem_size", "0", "--replay", "image"], ["--replay"]),
            (["--task_step", "1", "--mbce", "0", "--pos_weight", "2"], ["--pos_weight"]),
            (["--task_step", "1", "--kd", "0", "--kd_mode", "plain"], ["--kd_mode"]),
            (["--task_step", "0", "--prev_checkpoint", "f.pth"], ["--prev_checkpoint"]),
            (["--task_step", "1", "--prev_checkpoint", "f.pth"], []),
            (["--test", "--lr", "1", "--name", "x", "--eval_crop", "off", "--overwrite"],
             ["--lr", "--overwrite"]),
            ([*DKD, "--task_step", "0", "--dkd_pos", "1", "--replay", "none"],
             ["--replay", "--dkd_pos"]),
            ([*DKD, "--task_step", "1", "--replay", "image", "--mem_size", "5", "--kd", "2",
              "--dkd_pos", "1", "--dkd_neg", "2"], []),
            ([*DKD, "--task_step", "1", "--replay", "none", "--pseudo_labels", "off", "--kd_mode",
              "plain", "--rskd_region", "all", "--pseudo_thresh", "0.6", "--fusion", "off"],
             ["--pseudo_thresh", "--pseudo_labels", "--kd_mode", "--rskd_region", "--fusion"]),
            (["--task_step", "1", "--dkd_pos", "1", "--dkd_neg", "2"], ["--dkd_pos", "--dkd_neg"]),
            (["--test", "-r", "f.pth", "--name", "x", "--save_dir", "y"], ["--name", "--save_dir"]),
            (["-d", "0,1"], ["-d"]),
            (["-d", "2"], []),
        ],
    )  # fmt: skip
    def test_training_names_them(self, flags, unused, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        assert [text.split()[0] for text in read_train(flags)[1].unused] == unused

    def test_evaluation_names_those_of_training(self, tmp_path):
        (tmp_path / "c.pth").touch()
        write(tmp_path, Config().to_dict()).rename(tmp_path / "config.json")
        flags = ["-r", str(tmp_path / "c.pth"), "--score", "0.3", "--lr", "1", "--bs", "4"]
        call = read_eval([*flags, "--crop_size", "64", "--task_step", "2"])[1]
        assert call.unused == ["--bs (only in training)", "--lr (only in training)"]
        config, call = read_eval([*flags[:2], "--eval_crop", "off", "--crop_size", "64"])
        assert not config.data.test.args.transform
        assert call.unused == ["--crop_size (not with whole images)"]
