"""Every option of the project: the configuration of an experiment, and what a single call asks for.

An option stands here once, with its default, its help, its flag and what is allowed. utils/config.py
reads JSON files and command lines by that, writes the help, and compares two configurations.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.config import (
    Parser,
    add_flags,
    apply_flags,
    get,
    no_path,
    option,
    options,
    put,
    read_json,
    section,
    without_effect,
)
from utils.distributed import select_devices
from utils.errors import UserError
from utils.metrics import METRICS

# The options that an evaluation makes use of; all others were of interest to the training.
EVALUATED = {
    "data_loader.args.data_root",
    "data_loader.args.num_workers",
    "data_loader.args.task.name",
    "data_loader.args.task.setting",
    "data_loader.args.task.step",
    "data_loader.args.task.idxs_path",
    "data_loader.args.train.args.transform_args.crop_size",  # and those of val and test by its flag
    "data_loader.args.val.args.transform",  # and that of test by its flag
    "data_loader.args.test.args.transform",
    "data_loader.args.test.args.masking_value",
    "data_loader.args.test.args.transform_args.crop_size",
    "data_loader.args.dataset.zero",
    "data_loader.args.dataset.highest_id",
    "data_loader.args.dataset.val_list",
    "data_loader.args.dataset.val_images",
    "data_loader.args.dataset.val_labels",
    "data_loader.args.allow_val_in_train",
    "arch.args.backbone",
    "multiprocessing_distributed",
    "dist_url",
}
SETTINGS = ("overlap", "disjoint", "sequential")
TRAINS = ("overwrite", "prev_checkpoint")  # what a call can ask for, and means nothing to an evaluation
CONFIGS = Path(__file__).resolve().parent
DEFAULT_CONFIG = CONFIGS / "config_voc.json"

# Keys of configurations of DKD and EIR that are no options here, or (the first two) of DKD alone. With
# None the key is ignored with a warning; else it has one possible value (or several ways to write it),
# which may stand in the file (with a warning if it is 0 or false, which switch something off that is
# not here), and any other one is an error.
ACCEPTED = {
    "hyperparameter.dkd_pos": None,
    "hyperparameter.dkd_neg": None,
    "test": None,
    "mix_mask": None,
    "proto_channels": None,
    "proto_layer": None,
    "margin": None,
    "n_gpu": None,  # the visible GPUs decide
    "hyperparameter.fc": None,
    "hyperparameter.fs": None,
    "hyperparameter.loss_lovasz": (0,),
    "data_loader.args.val.cross_val": (False,),
    "arch.type": ("DeepLabV3",),
    "arch.args.output_stride": (16,),
    "data_loader.type": ("VOCIncrementalDataLoader", "ADEIncrementalDataLoader"),
    "data_loader.args.train.args.transform": (True,),
    "optimizer.type": ("SGD",),
    "lr_scheduler.type": ("PolyLR",),
    "evaluator": ({"type": "Evaluator", "args": {}}, {"type": "Evaluator"}, {}),
}
DKD_ALONE = ("hyperparameter.dkd_pos", "hyperparameter.dkd_neg")


def _no_folder_name(name):
    """What keeps a run's name from being part of a folder's name."""
    if not name.strip(".") or "/" in name or len(name.encode(errors="replace")) > 200:
        return "it must be a name that a folder can have"
    if not name.isprintable():
        return "it must be printable, in one line"


def _no_devices(text):
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        return "give GPU indices such as 0 or 0,1"


def _no_classes(classes):
    """What keeps an object from being the classes of a data set."""
    ids = list(classes.values())
    if not ids or not all(type(i) is int and 0 < i < 255 for i in ids) or len(set(ids)) < len(ids):
        return "give names and their ids in the label maps, from 1 to 254 and all different"
    if "background" in classes or not all(name.strip() and name.isprintable() for name in classes):
        return "each class needs a printable name of its own, and background is none of them"


def _no_patterns(patterns):
    """What keeps a list from being where the labels of images are."""
    if not patterns or not all(type(p) is str and _is_pattern(p) for p in patterns):
        return "give paths in which {} stands for the id, such as SegmentationClass/{}.png"


def _is_pattern(text):
    return "{}" in text and text.count("{") == text.count("}") == 1 and text.isprintable()


def _no_pattern(pattern):
    return _no_patterns([pattern])


def _no_folders(folders):
    if not folders or not all(type(folder) is str and folder.isprintable() for folder in folders):
        return 'give a list of folders, "" for the data root itself'


def _no_counts(counts):
    if len(counts) not in (0, 2) or not all(type(count) is int for count in counts):
        return "give the numbers of training and of validation images, or an empty list"


def _no_backbone(name):
    if name not in ("resnet101", "resnet50", "tiny") and not name.startswith("timm/"):
        return "allowed: resnet101, resnet50, tiny, timm/NAME"


def _no_norm(kind):
    if kind == "iabn_sync":
        return "that needs the inplace_abn package, which is not used here: choose bn_sync or bn"


# Whether a configuration makes use of an option, and when it does, in words. A flag that is given where
# it is not used is a warning, since the same flags are often given for every step of a task.
AT_STEP_0 = (lambda c: c.task.step == 0, "at step 0")
WITH_MEMORY = (lambda c: c.task.step > 0 and c.data.memory.replay != "none", "where the step replays")
WITH_INSTANCES = (
    lambda c: (
        WITH_MEMORY[0](c) and c.data.memory.replay in ("instance", "eir") and c.data.memory.mem_size > 0
    ),
    "where the step replays instances",
)
WITH_PASTES = (
    lambda c: WITH_INSTANCES[0](c) and c.data.memory.replay == "eir",
    "with --replay eir and a memory",
)
IN_EIR = (lambda c: c.task.step > 0 and c.method == "eir", "at steps >= 1 of --method eir")
IN_DKD = (lambda c: c.task.step > 0 and c.method == "dkd", "at steps >= 1 of --method dkd")
WITH_PSEUDO_LABELS = (
    lambda c: IN_EIR[0](c) and c.hyperparameter.pseudo_labels != "off",
    "at steps >= 1 of --method eir with pseudo labels",
)
WITH_DISTILLATION = (
    lambda c: IN_DKD[0](c) or (c.task.step > 0 and c.hyperparameter.kd_mode != "none"),
    "at steps >= 1 with distillation",
)
WITH_KD = (
    lambda c: IN_EIR[0](c) and c.hyperparameter.kd > 0,
    "at steps >= 1 of --method eir with --kd above 0",
)
WITH_RSKD = (
    lambda c: WITH_KD[0](c) and c.hyperparameter.kd_mode == "rskd",
    "with --kd_mode rskd and --kd above 0",
)
WITH_FUSION = (
    lambda c: WITH_PASTES[0](c) and c.hyperparameter.paste.fusion,
    "with --replay eir and --fusion on",
)
WITH_FILL_INS = (
    lambda c: (
        WITH_PASTES[0](c)
        and c.hyperparameter.paste.class_combination
        and (c.hyperparameter.paste.position or c.hyperparameter.paste.fill_in == "none")
    ),
    "with --replay eir and --class_combination on; best and next with --position on",
)
WITH_BCE = (lambda c: c.hyperparameter.mbce > 0, "with --mbce above 0")
WITH_BUDGET = (
    lambda c: c.task.step > 0 and (c.data.memory.mem_size > 0 or c.data.memory.replay == "none"),
    "at steps >= 1 with --mem_size above 0",
)


@dataclass
class ArchArgs:
    norm_act: str = option(
        "bn_sync",
        "batch normalisation: synchronised over CUDA processes, or plain",
        choices=("bn_sync", "bn"),
        complain=_no_norm,
    )
    backbone: str = option(
        "resnet101",
        "feature network: resnet101, resnet50, tiny (for tests), or timm/NAME with the package timm",
        "--backbone",
        complain=_no_backbone,
    )
    backbone_pretrained: bool = option(True, "start step 0 from ImageNet weights", used=AT_STEP_0)
    backbone_weights: str | None = option(
        None,
        "file with the backbone's ImageNet weights, or 'none' to start from scratch; "
        "without it torchvision downloads them",
        "--backbone_weights",
        complain=no_path,
        used=AT_STEP_0,
    )
    freeze_all_bn: bool = option(
        False,
        "batch normalisation frozen; dropout is off at steps >= 1 anyway",
        "--freeze_bn",
        switch=True,
    )


@dataclass
class Arch:
    args: ArchArgs = section(ArchArgs)


VOC_CLASSES = {
    "aeroplane": 1, "bicycle": 2, "bird": 3, "boat": 4, "bottle": 5, "bus": 6, "car": 7, "cat": 8,
    "chair": 9, "cow": 10, "diningtable": 11, "dog": 12, "horse": 13, "motorbike": 14, "person": 15,
    "pottedplant": 16, "sheep": 17, "sofa": 18, "train": 19, "tvmonitor": 20,
}  # fmt: skip


@dataclass
class DataSet:
    """What a data set is: its classes, and where its files are. The defaults are VOC 2012's."""

    name: str = option("VOC 2012", "what messages call it", incidental=True)
    classes: dict[str, int] = option(
        VOC_CLASSES,
        "name and id in the label maps of each class, in learning order",
        complain=_no_classes,
    )
    highest_id: int = option(
        20,
        "greatest id in the label maps beside 255, which is void; the ids of no class are background",
        low=1,
        high=254,
    )
    zero: str = option(
        "background", "what id 0 means in the label maps", choices=("background", "void")
    )
    palette: str = option(
        "voc",
        "what the colours of a label in palette mode say; voc: the ids, by VOC's colours or as grey "
        "levels, and are compared with them; any: nothing",
        choices=("voc", "any"),
        incidental=True,
    )
    folders: list[str] = option(
        ["", "VOC2012", "VOCdevkit/VOC2012"],
        "where below the data root the data set may lie",
        complain=_no_folders,
        incidental=True,
    )
    train_list: str | None = option(
        "ImageSets/Segmentation/train_aug.txt",
        "list of the training images, below the data root or else the project; none: all images",
    )
    train_images: str = option(
        "JPEGImages/{}.jpg", "path of a training image, {} standing for its id", complain=_no_pattern
    )
    train_labels: list[str] = option(
        ["SegmentationClassAug/{}.png", "SegmentationClass/{}.png"],
        "paths that its label may have, the first that is there counts",
        complain=_no_patterns,
    )
    val_list: str | None = option(
        "ImageSets/Segmentation/val.txt", "list of the validation images, in the same way"
    )
    val_images: str = option("JPEGImages/{}.jpg", "path of a validation image", complain=_no_pattern)
    val_labels: list[str] = option(
        ["SegmentationClass/{}.png", "SegmentationClassAug/{}.png"],
        "paths that its label may have",
        complain=_no_patterns,
    )
    counts: list[int] = option(
        [],
        "numbers of training and validation images of the whole data set, for a line of the log that "
        "says if some are missing; those of VOC 2012 are known",
        complain=_no_counts,
        incidental=True,
    )

    @property
    def whole(self) -> list[int]:
        """Training and validation images of the whole data set; empty where that is not known."""
        return self.counts or ([10582, 1449] if self.name == "VOC 2012" else [])


@dataclass
class TaskArgs:
    name: str = option(
        "15-5",
        "task: A-B (A classes, then B at a time), of VOC also 15-1_b .. 15-1_w, or joint",
        "--task_name",
    )
    step: int = option(0, "step of the task, from 0", "--task_step", low=0)
    setting: str = option(
        "overlap",
        "which images and labels a step sees",
        "--task_setting",
        choices=SETTINGS,
    )
    idxs_path: str | None = option(
        None,
        "folder for the cached label index; not set: inside the data root",
        "--idxs_path",
        complain=no_path,
        incidental=True,
    )


@dataclass
class TransformArgs:
    crop_size: int = option(512, "side of the square crop, pixels", "--crop_size", low=32, high=10_000)


@dataclass
class TrainSetArgs:
    transform_args: TransformArgs = section(TransformArgs)
    masking_value: int = option(0, "label of hidden classes: background or void", choices=(0, 255))


@dataclass
class EvalSetArgs:
    transform: bool = option(
        True,
        "evaluate on the centre crop, the shorter side resized to crop_size; off: on whole images at "
        "their own size",
        "--eval_crop",
    )
    transform_args: TransformArgs = section(TransformArgs)
    masking_value: int = option(0, "label of hidden classes: background or void", choices=(0, 255))


@dataclass
class TrainSet:
    args: TrainSetArgs = section(TrainSetArgs)
    batch_size: int = option(
        32, "images per batch and process", ("--bs", "--batch_size"), low=1, incidental=True
    )


@dataclass
class EvalSet:
    args: EvalSetArgs = section(EvalSetArgs)
    batch_size: int = option(8, "images per evaluation batch", low=1, incidental=True)


@dataclass
class MemoryArgs:
    mem_size: int = option(
        100,
        "stored instances, or images, in all; 0: no memory",
        "--mem_size",
        low=0,
        used=WITH_MEMORY,
    )
    replay: str = option(
        "eir",
        "what the memory is used for: nothing, whole stored images, instances shown alone, "
        "or instances shown and pasted (EIR)",
        "--replay",
        choices=("none", "image", "instance", "eir"),
        used=WITH_BUDGET,
    )
    surroundings: float = option(
        0.0,
        "what of its surroundings an instance is stored and replayed with: a margin on each side of "
        "its box, as a share of the box's width and height; 0: none, as in the paper. What is pasted "
        "stays the instance alone",
        "--surroundings",
        low=0,
        high=1,
        used=WITH_INSTANCES,
    )


@dataclass
class DataArgs:
    data_root: str = option(
        "data/VOC2012",
        "folder of the data set; of VOC: VOC2012, or the VOCdevkit above it",
        "--data_root",
        complain=no_path,
        incidental=True,
    )
    allow_val_in_train: bool = option(
        False,
        "train on images of the validation list too, if the training list names them",
        "--allow_val_in_train",
        incidental=True,
    )
    dataset: DataSet = section(DataSet)
    task: TaskArgs = section(TaskArgs)
    train: TrainSet = section(TrainSet)
    val: EvalSet = section(EvalSet)
    test: EvalSet = section(EvalSet)
    num_workers: int = option(
        4, "loader processes per training process", "--num_workers", low=0, incidental=True
    )
    pin_memory: bool = option(True, "pinned host memory for copies to the GPU", incidental=True)
    memory: MemoryArgs = section(MemoryArgs)


@dataclass
class DataLoaderSection:
    args: DataArgs = section(DataArgs)


@dataclass
class OptimizerArgs:
    lr: float = option(
        1e-3,
        "learning rate of the backbone; ASPP and classifiers x10",
        ("--lr", "--learning_rate"),
        low=0,
    )
    weight_decay: float = option(1e-4, "weight decay; at steps >= 1 new classifier only", low=0)
    momentum: float = option(0.9, "momentum", low=0, high=1)
    nesterov: bool = option(True, "Nesterov momentum")


@dataclass
class Optimizer:
    args: OptimizerArgs = section(OptimizerArgs)


@dataclass
class PasteArgs:
    """Switches of EIR's paste (METHOD 5, 2-5); the defaults are the paper's."""

    pastes: int = option(
        3,
        "instances pasted into an image, at most",
        "--pastes",
        low=1,
        high=20,
        used=WITH_PASTES,
    )
    cell: int = option(
        250,
        "side of a cell in pixels at crop 512, scaled with the crop",
        low=1,
        high=512,
        used=WITH_PASTES,
    )
    beta: float = option(
        1.0, "parameter of the Beta distribution of lambda", low=1e-3, used=WITH_FUSION
    )
    lambda_min: float = option(
        0.0,
        "lower bound of lambda, an instance's weight in the mix",
        "--lambda_min",
        low=0,
        high=1,
        used=WITH_FUSION,
    )
    class_combination: bool = option(
        True,
        "potential old classes first; off: random classes",
        "--class_combination",
        used=WITH_PASTES,
    )
    position: bool = option(
        True,
        "cells with most background first; off: random cells",
        "--position",
        used=WITH_PASTES,
    )
    fusion: bool = option(
        True,
        "mix instance and image by lambda; off: lambda 1",
        "--fusion",
        used=WITH_PASTES,
    )
    fill_in: str = option(
        "best",
        "cells of the random fill-in classes: all in the best, or the next ones; none: no fill-ins",
        "--fill_in",
        choices=("best", "next", "none"),
        used=WITH_FILL_INS,
    )
    max_upscale: float | None = option(
        None,
        "largest magnification of an instance",
        "--max_upscale",
        low=0.01,
        used=WITH_PASTES,
    )
    on_replay: str = option(
        "on",
        "paste on replay images too; only: on them alone",
        "--paste_on_replay",
        choices=("on", "off", "only"),
        old={True: "on", False: "off"},
        used=WITH_PASTES,
    )
    augment: str = option(
        "crop",
        "how an instance varies from paste to paste; crop: it passes the training transform, which may "
        "truncate and squash it; stretch: whole, mirrored, its aspect changed; off: as stored",
        "--paste_augment",
        choices=("crop", "stretch", "off"),
        old={True: "stretch", False: "off"},
        used=WITH_PASTES,
    )


@dataclass
class Hyperparameter:
    pos_weight: float = option(
        1.0,
        "weight of the positive BCE term, foreground channels",
        "--pos_weight",
        low=0,
        used=WITH_BCE,
    )
    mbce: float = option(1.0, "weight of the BCE loss", "--mbce", low=0)
    kd: float = option(
        5.0,
        "weight of the distillation",
        "--kd",
        low=0,
        used=WITH_DISTILLATION,
    )
    ac: float = option(
        0.0,
        "weight of the auxiliary classifier's loss at step 0 and in DKD, whose value is 1; above 0 it "
        "has EIR's steps >= 1 only start the new classifier from that one",
        "--ac",
        low=0,
    )
    dkd_pos: float = option(
        5.0,
        "DKD: weight of the distillation through the classifiers' positive weights",
        "--dkd_pos",
        low=0,
        used=IN_DKD,
    )
    dkd_neg: float = option(
        5.0,
        "DKD: weight of the distillation through their negative weights",
        "--dkd_neg",
        low=0,
        used=IN_DKD,
    )
    pseudo_thresh: float = option(
        0.7,
        "score from which a pseudo label is taken",
        "--pseudo_thresh",
        low=0,
        high=1,
        used=WITH_PSEUDO_LABELS,
    )
    ignore_thresh: float | None = option(
        None,
        "score of an old class from which background without a pseudo label and without an instance "
        "is left out of the BCE (needs pseudo labels); none: all counts as background",
        "--ignore_thresh",
        low=0,
        high=1,
        used=WITH_PSEUDO_LABELS,
    )
    pseudo_labels: str = option(
        "crop",
        "pseudo labels of the old classes from the teacher; crop: it looks at each training crop, as "
        "in the paper; image: once at each whole image, before the first epoch, and crops take their "
        "part (a pass of the teacher less in each iteration); off: none",
        "--pseudo_labels",
        choices=("off", "crop", "image"),
        used=IN_EIR,
    )
    kd_mode: str = option(
        "rskd",
        "distillation, by what the teacher's background is compared with; rskd: on pixels of a new "
        "class the student's new classes, as in the paper (see --rskd_region); plain: its background; "
        "unbiased: its background and new classes together, as in MiB; none: no distillation",
        "--kd_mode",
        choices=("none", "plain", "unbiased", "rskd"),
        used=WITH_KD,
    )
    rskd_region: str = option(
        "new",
        "pixels distilled on; new: of the new classes, as in the paper; all: all that are not void",
        "--rskd_region",
        choices=("new", "all"),
        used=WITH_RSKD,
    )
    paste: PasteArgs = section(PasteArgs)


@dataclass
class PolyArgs:
    power: float = option(0.9, "exponent of the poly schedule", low=0)
    warmup: int = option(
        0, "iterations over which the learning rate rises to its value", "--warmup", low=0
    )


@dataclass
class LRScheduler:
    args: PolyArgs = section(PolyArgs)


@dataclass
class TrainerSection:
    epochs: int = option(60, "epochs", ("--epochs", "--ep"), low=1)
    save_dir: str = option(
        "_saved_voc", "folder of all outputs", "--save_dir", complain=no_path, incidental=True
    )
    save_period: int = option(
        -1, "epochs between kept checkpoints, -1: the last only", low=-1, incidental=True
    )
    validation_period: int = option(-1, "epochs between validations, -1: never", low=-1)
    verbosity: int = option(
        2, "0: warnings, 1: a line per epoch, 2: progress too", low=0, high=2, incidental=True
    )
    monitor: str = option(
        "off",
        "'off', or 'max' or 'min' and a validated metric, with _old or _new to narrow it; "
        "model_best.pth is then chosen on images of the test",
    )
    early_stop: int = option(-1, "validations without improvement before stopping, -1: off", low=-1)
    reset_best_mnt: bool = option(False, "forget the best value when resuming", incidental=True)
    tensorboard: bool = option(False, "TensorBoard events, if it is installed", incidental=True)
    accumulate: int = option(
        1, "micro-batches that a batch is split into", "--accumulate", low=1, incidental=True
    )
    log_interval: int = option(10, "iterations between progress reports", low=1, incidental=True)


@dataclass
class Config:
    """The configuration of an experiment, in the nested JSON shape of DKD and EIR."""

    name: str = option("EIR", "name of the run, part of its folder", "--name", complain=_no_folder_name)
    method: str = option("eir", "the method of training", "--method", choices=("eir", "dkd"))
    seed: int = option(1, "seed of everything random", "--seed", low=0)
    use_amp: bool = option(True, "mixed precision")
    amp_dtype: str = option(
        "auto",
        "type of mixed precision; auto: bf16 where the GPU has it, else fp16, on the CPU none; bf16: "
        "on the CPU too, which pays where the processor has it (AMX)",
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        used=(lambda c: c.use_amp, "with use_amp in the configuration"),
    )
    multiprocessing_distributed: bool = option(
        False,
        "one process per visible GPU",
        "--multiprocessing_distributed",
        switch=True,
        incidental=True,
    )
    rank: int = option(0, "index of this node", low=0, incidental=True)
    world_size: int = option(1, "number of nodes", low=1, incidental=True)
    dist_backend: str = option(
        "nccl", "backend on CUDA (the CPU has gloo)", choices=("nccl", "gloo"), incidental=True
    )
    dist_url: str | None = option(
        None,
        "tcp://host:port of the first process; without a value, or not given: a free port",
        "--dist_url",
        bare=True,
        incidental=True,
    )
    arch: Arch = section(Arch)
    data_loader: DataLoaderSection = section(DataLoaderSection)
    optimizer: Optimizer = section(Optimizer)
    hyperparameter: Hyperparameter = section(Hyperparameter)
    lr_scheduler: LRScheduler = section(LRScheduler)
    metrics: list[str] = option(list(METRICS), "validated", choices=tuple(METRICS), incidental=True)
    trainer: TrainerSection = section(TrainerSection)

    @property
    def data(self) -> DataArgs:
        return self.data_loader.args

    @property
    def task(self) -> TaskArgs:
        return self.data_loader.args.task

    def step_dir(self, step: int | None = None, kind: str = "models") -> Path:
        """<save_dir>/<kind>/<setting>_<task>_<name>/step_<t>, t being the config's own step."""
        task = self.task
        run = f"{task.setting}_{task.name}_{self.name}"
        step = task.step if step is None else step
        return Path(self.trainer.save_dir).expanduser() / kind / run / f"step_{step}"

    def to_dict(self) -> dict:
        """The configuration as the JSON object that `load_config` reads."""
        content = asdict(self)
        if self.method != "dkd":
            for path in DKD_ALONE:
                section, name = path.split(".")
                del content[section][name]
        return content


@dataclass
class Call:
    """What one call of an entry point asks for, beside the configuration of the experiment."""

    config: str | None = option(
        None, f"JSON configuration (train: {DEFAULT_CONFIG.name}; eval: beside the checkpoint)",
        ("-c", "--config"), complain=no_path,
    )  # fmt: skip
    device: str | None = option(
        None,
        "GPU indices such as 0,1; a CUDA_VISIBLE_DEVICES that is already set wins",
        ("-d", "--device"),
        complain=_no_devices,
    )
    test: bool = option(False, "evaluate only; eval_voc.py does nothing else", "--test", switch=True)
    ignored: list[str] = option([], "keys of the configuration file that mean nothing here")
    unused: list[str] = option([], "flags that were given and have no effect in this call")


@dataclass
class TrainCall(Call):
    """A call of train_voc.py."""

    resume: str | None = option(
        None,
        "go on from this checkpoint; 'auto': from the step's last one, if there is one",
        ("-r", "--resume"),
        complain=no_path,
    )
    overwrite: bool = option(
        False, "train the step anew, replacing its output", "--overwrite", switch=True
    )
    prev_checkpoint: str | None = option(
        None,
        "start step t >= 1 from this model instead of step t-1's own output",
        "--prev_checkpoint",
        complain=no_path,
    )


@dataclass
class EvalCall(Call):
    """A call of eval_voc.py."""

    resume: str | None = option(None, "checkpoint to evaluate", ("-r", "--resume"), complain=no_path)
    output: str | None = option(
        None, "write the numbers to this JSON file", "--output", complain=no_path
    )
    score: float = option(
        0.5, "sigmoid score that a prediction asks for, else it is background", "--score",
        low=0, high=1,
    )  # fmt: skip


def load_config(path: str | Path) -> tuple[Config, list[str]]:
    """A configuration from a JSON file, and the paths of its keys that mean nothing here.

    Raises UserError as utils.config.read_json does.
    """
    return read_json(Config, path, ACCEPTED)


def parse_train(
    arguments: list[str] | None = None,
    default: Path = DEFAULT_CONFIG,
    program: str = "train_voc.py",
) -> tuple[Config, TrainCall]:
    """Configuration and request of a call of train_voc.py, whose device is selected.

    arguments: those of this process by default. default: the configuration file where the call names
    none; program: what the help calls it. UserError for bad input.
    """
    return _selected(read_train(sys.argv[1:] if arguments is None else arguments, default, program))


def parse_eval(
    arguments: list[str] | None = None,
    default: Path = DEFAULT_CONFIG,
    program: str = "eval_voc.py",
) -> tuple[Config, EvalCall]:
    """As parse_train, of eval_voc.py; default: the configuration that the help shows."""
    return _selected(read_eval(sys.argv[1:] if arguments is None else arguments, default, program))


def _selected(parsed):
    select_devices(parsed[1].device)
    return parsed


TRAINING = """Train one step of a continual task, then test it.

python {program} --task_name {task} --task_step 0 --pos_weight 2
python {program} --task_name {task} --task_step 1 --lr {lr:g} --freeze_bn
"""
EVALUATION = """Evaluate a checkpoint on the test images of its step.

python {program} -r {step_1}/checkpoint-epoch{epochs}.pth
"""


def read_train(
    arguments: list[str], default: Path = DEFAULT_CONFIG, program: str = "train_voc.py"
) -> tuple[Config, TrainCall]:
    """As parse_train, but no device is selected."""
    config, ignored = load_config(_given("--config", arguments, program) or default)
    call = TrainCall(ignored=ignored)
    parsed = _read(arguments, config, call, program, TRAINING)
    if call.test:
        named = call.resume not in (None, "auto")  # else the checkpoint is looked for in its own folder
        own_folder = set() if named else {"name", "trainer.save_dir"}
        call.unused += _only_in_training(config, parsed, EVALUATED | own_folder)
        call.unused += [f"--{name} (not with --test)" for name in vars(parsed) if name in TRAINS]
    elif call.prev_checkpoint and config.task.step == 0:
        call.unused.append("--prev_checkpoint (only at steps >= 1)")
    if call.overwrite and call.resume:
        raise UserError("--overwrite and --resume exclude each other: give one of them")
    if (
        config.hyperparameter.ignore_thresh is not None
        and config.hyperparameter.pseudo_labels != "crop"
    ):
        raise UserError("--ignore_thresh works with --pseudo_labels crop only: leave one of them out")
    memory = config.data.memory
    backgrounds = memory.replay == "image" or (memory.replay != "none" and memory.surroundings > 0)
    hides = config.data.train.args.masking_value != 0
    if hides and backgrounds and config.task.step and config.method == "eir":
        raise UserError(
            "masking_value 255 is not for memories that store background, in which hidden classes are "
            "background: leave it at 0, or store instances without --surroundings"
        )
    if config.method == "dkd":
        _check_dkd(config)
    return config, call


def _check_dkd(config):
    """Raise UserError for settings with which DKD is none."""
    if config.hyperparameter.ac == 0:
        raise UserError(
            "--method dkd starts new classifiers from an auxiliary one, which is trained with a weight "
            "--ac above 0: give --ac 1"
        )
    if config.task.step and config.data.memory.replay not in ("none", "image"):
        raise UserError(
            f"--method dkd knows no --replay {config.data.memory.replay}: give --replay none (DKD) or "
            "--replay image (DKD-M)"
        )


def read_eval(
    arguments: list[str], default: Path = DEFAULT_CONFIG, program: str = "eval_voc.py"
) -> tuple[Config, EvalCall]:
    """As parse_eval, but no device is selected."""
    given, checkpoint = _given("--config", arguments, program), _given("--resume", arguments, program)
    wants_help = {"-h", "--help"} & set(arguments)
    if not given and not wants_help:
        if not checkpoint:
            raise UserError("give the checkpoint to evaluate with -r FILE")
        if not Path(checkpoint).is_file():
            raise UserError(f"no checkpoint at {checkpoint}: give the path of a .pth file with -r")
        if not (Path(checkpoint).parent / "config.json").is_file():
            raise UserError(f"no config.json beside {checkpoint}: give the configuration with -c")
        given = Path(checkpoint).parent / "config.json"
    config, ignored = load_config(given or default)
    if not _given("--config", arguments, program):  # how the training was started is not how this is
        config.rank, config.world_size, config.dist_url = 0, 1, None
    call = EvalCall(ignored=ignored)
    parsed = _read(arguments, config, call, program, EVALUATION)
    call.unused += _only_in_training(config, parsed, EVALUATED)
    if not call.resume:
        raise UserError("give the checkpoint to evaluate with -r FILE")
    return config, call


def _only_in_training(config, parsed, evaluated):
    """The flags that were given and that an evaluation makes no use of, each with the reason."""
    given = {o.path: o.metadata["flags"][0] for o in options(Config) if o.path in vars(parsed)}
    unused = [f"{flag} (only in training)" for path, flag in given.items() if path not in evaluated]
    if "--crop_size" in given.values() and not config.data.test.args.transform:
        unused.append("--crop_size (not with whole images)")
    return unused


def _given(flag, arguments, program):
    """The value of -c or -r, needed before the parser that shows the file's defaults exists."""
    parser = Parser(program, "")
    add_flags(parser, EvalCall())
    words = [word for word in arguments if word not in ("-h", "--help")]
    value = getattr(parser.parse_known_args(words)[0], flag.strip("-"), None)
    return value and os.path.expanduser(value)


def _read(arguments, config, call, program, about):
    """Write the flags that were given into the configuration and the call; returns them.

    about: the beginning of the help, its examples filled with what the configuration has.
    """
    described = about.format(
        program=program,
        task=config.task.name,
        lr=config.optimizer.args.lr / 10,  # as in the paper
        step_1=config.step_dir(1),
        epochs=config.trainer.epochs,
    )
    parser = Parser(program, described)
    for target in (call, config):
        add_flags(parser, target)
    parsed = parser.parse_args(arguments)
    for target in (call, config):
        apply_flags(target, parsed)
    if config.method == "dkd":
        call.ignored = [path for path in call.ignored if path not in DKD_ALONE]
    else:
        call.ignored = [f"{p} (of --method dkd)" if p in DKD_ALONE else p for p in call.ignored]
        for path in DKD_ALONE:
            put(config, path, get(Config(), path))
    evaluates = call.test or isinstance(call, EvalCall)
    call.unused = [] if evaluates else without_effect(config, parsed)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if call.device is not None and visible not in (None, call.device):
        call.unused.append(f"-d (CUDA_VISIBLE_DEVICES={visible} wins)")
    return parsed
