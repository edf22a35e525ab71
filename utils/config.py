"""The configuration: the JSON shape of DKD and EIR as typed dataclasses.

Each option is declared once, here: name, type, default, allowed values, help. utils/config_file.py
reads them from JSON, utils/flags.py from the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path


def option(default, help, choices=None, low=None, high=None):
    """A dataclass field with its help text and the values that are allowed."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


def section(cls):
    return field(default_factory=cls)


@dataclass
class ArchArgs:
    output_stride: int = option(16, "output stride of the features", choices=(16,))
    norm_act: str = option(
        "bn_sync",
        "batch normalisation: synchronised over CUDA processes, or plain",
        choices=("bn_sync", "bn"),
    )
    backbone: str = option("resnet101", "feature network", choices=("resnet101", "resnet50", "tiny"))
    backbone_pretrained: bool = option(True, "start step 0 from ImageNet weights")
    backbone_weights: str | None = option(
        None,
        "file with the backbone's ImageNet weights, or 'none' to start from scratch; "
        "without it torchvision downloads them",
    )
    freeze_all_bn: bool = option(False, "batch normalisation frozen, dropout off")


@dataclass
class Arch:
    type: str = option("DeepLabV3", "network", choices=("DeepLabV3",))
    args: ArchArgs = section(ArchArgs)


@dataclass
class TaskArgs:
    name: str = option("15-5", "task: A-B (A classes, then B at a time), 15-1_b .. 15-1_w, or joint")
    step: int = option(0, "step of the task, from 0", low=0)
    setting: str = option(
        "overlap",
        "which images and labels a step sees",
        choices=("overlap", "disjoint", "sequential"),
    )
    idxs_path: str | None = option(
        None, "folder for the cached label index (default: inside the data root)"
    )


@dataclass
class TransformArgs:
    crop_size: int = option(512, "side of the square crop, pixels", low=32)


@dataclass
class TrainSetArgs:
    transform: bool = option(True, "random resized crop and flip", choices=(True,))
    transform_args: TransformArgs = section(TransformArgs)
    masking_value: int = option(0, "label of hidden classes: background or void", choices=(0, 255))


@dataclass
class EvalSetArgs:
    transform: bool = option(
        True, "shorter side to crop_size and centre crop; false: whole images at their own size"
    )
    transform_args: TransformArgs = section(TransformArgs)
    masking_value: int = option(0, "label of hidden classes: background or void", choices=(0, 255))


@dataclass
class TrainSet:
    args: TrainSetArgs = section(TrainSetArgs)
    batch_size: int = option(32, "images per batch and process", low=1)


@dataclass
class EvalSet:
    args: EvalSetArgs = section(EvalSetArgs)
    batch_size: int = option(8, "images per evaluation batch", low=1)


@dataclass
class MemoryArgs:
    mem_size: int = option(100, "stored instances in all, 0: no memory", low=0)
    replay: str = option(
        "eir",
        "what the memory is used for: nothing, whole stored images, instances shown alone, "
        "or instances shown and pasted (EIR)",
        choices=("none", "image", "instance", "eir"),
    )


@dataclass
class DataArgs:
    data_root: str = option("data/VOC2012", "VOC2012 folder, or the VOCdevkit above it")
    task: TaskArgs = section(TaskArgs)
    train: TrainSet = section(TrainSet)
    val: EvalSet = section(EvalSet)
    test: EvalSet = section(EvalSet)
    num_workers: int = option(4, "loader processes per training process", low=0)
    pin_memory: bool = option(True, "pinned host memory for copies to the GPU")
    memory: MemoryArgs = section(MemoryArgs)


@dataclass
class DataLoaderSection:
    type: str = option("VOCIncrementalDataLoader", "loader", choices=("VOCIncrementalDataLoader",))
    args: DataArgs = section(DataArgs)


@dataclass
class OptimizerArgs:
    lr: float = option(1e-3, "learning rate of the backbone; ASPP and classifiers x10", low=0)
    weight_decay: float = option(1e-4, "weight decay; at steps >= 1 new classifier only", low=0)
    momentum: float = option(0.9, "momentum", low=0, high=1)
    nesterov: bool = option(True, "Nesterov momentum")


@dataclass
class Optimizer:
    type: str = option("SGD", "optimiser", choices=("SGD",))
    args: OptimizerArgs = section(OptimizerArgs)


@dataclass
class PasteArgs:
    """Switches of EIR's paste (METHOD 5, 2-5); the defaults are the paper's."""

    pastes: int = option(3, "instances pasted into an image, at most", low=1, high=20)
    cell: int = option(
        250, "side of a cell in pixels at crop 512, scaled with the crop", low=1, high=512
    )
    beta: float = option(1.0, "parameter of the Beta distribution of lambda", low=1e-3)
    lambda_min: float = option(
        0.0, "lower bound of lambda, an instance's weight in the mix", low=0, high=1
    )
    class_combination: bool = option(True, "potential old classes first; off: random classes")
    position: bool = option(True, "cells with most background first; off: random cells")
    fusion: bool = option(True, "mix instance and image by lambda; off: lambda 1")
    fill_in: str = option(
        "best",
        "cells of the random fill-in classes: all in the best, or the next ones; none: no fill-ins",
        choices=("best", "next", "none"),
    )
    max_upscale: float | None = option(None, "largest magnification of an instance", low=0.01)
    on_replay: bool = option(True, "paste on replay images too")
    augment: bool = option(True, "mirror and stretch an instance at each paste")


@dataclass
class Hyperparameter:
    pos_weight: float = option(1.0, "weight of the positive BCE term, foreground channels", low=0)
    mbce: float = option(1.0, "weight of the BCE loss", low=0)
    kd: float = option(5.0, "weight of the distillation", low=0)
    ac: float = option(0.0, "weight of the auxiliary classifier loss (DKD)", low=0)
    pseudo_thresh: float = option(0.7, "score from which a pseudo label is taken", low=0, high=1)
    ignore_thresh: float | None = option(
        None,
        "score of an old class from which background without a pseudo label and without an instance "
        "is left out of the BCE (needs pseudo labels); none: all counts as background",
        low=0,
        high=1,
    )
    pseudo_labels: bool = option(True, "pseudo labels of the old classes from the teacher")
    kd_mode: str = option("rskd", "distillation", choices=("none", "plain", "unbiased", "rskd"))
    rskd_region: str = option(
        "all",
        "pixels distilled on; new: of new classes, without an instance",
        choices=("all", "new"),
    )
    paste: PasteArgs = section(PasteArgs)


@dataclass
class PolyArgs:
    power: float = option(0.9, "exponent of the poly schedule", low=0)


@dataclass
class LRScheduler:
    type: str = option("PolyLR", "schedule, per iteration", choices=("PolyLR",))
    args: PolyArgs = section(PolyArgs)


@dataclass
class Evaluator:
    type: str = option("Evaluator", "evaluator", choices=("Evaluator",))
    args: dict = field(default_factory=dict, metadata={"help": "no arguments"})


METRICS = ("Pixel_Accuracy", "Pixel_Accuracy_Class", "Mean_Intersection_over_Union")
GROUPS = ("overall", "old", "new", "harmonic")  # what each of them is the mean over


@dataclass
class TrainerSection:
    epochs: int = option(60, "epochs", low=1)
    save_dir: str = option("_saved_voc", "folder of all outputs")
    save_period: int = option(-1, "epochs between kept checkpoints, -1: the last only", low=-1)
    validation_period: int = option(-1, "epochs between validations, -1: never", low=-1)
    verbosity: int = option(2, "0: warnings, 1: a line per epoch, 2: progress too", low=0, high=2)
    monitor: str = option(
        "off", "'off', or 'max' or 'min' and a validated metric, with _old or _new to narrow it"
    )
    early_stop: int = option(-1, "validations without improvement before stopping, -1: off", low=-1)
    reset_best_mnt: bool = option(False, "forget the best value when resuming")
    tensorboard: bool = option(False, "TensorBoard events, if it is installed")
    accumulate: int = option(1, "micro-batches that a batch is split into", low=1)
    log_interval: int = option(10, "iterations between progress reports", low=1)


@dataclass
class Config:
    name: str = option("EIR", "name of the run, part of its folder")
    seed: int = option(1, "seed of everything random", low=0)
    use_amp: bool = option(True, "mixed precision")
    amp_dtype: str = option(
        "auto",
        "type of mixed precision; auto: bf16 where the GPU has it, else fp16, on the CPU none; bf16: "
        "on the CPU too, which pays where the processor has it (AMX)",
        choices=("auto", "bf16", "fp16"),
    )
    multiprocessing_distributed: bool = option(False, "one process per visible GPU")
    rank: int = option(0, "index of this node", low=0)
    world_size: int = option(1, "number of nodes", low=1)
    dist_backend: str = option("nccl", "backend on CUDA (the CPU has gloo)", choices=("nccl", "gloo"))
    dist_url: str | None = option(None, "tcp://host:port of the first process; none: a free port")
    n_gpu: int = option(1, "accepted from files of DKD and EIR; the visible GPUs decide", low=0)
    arch: Arch = section(Arch)
    data_loader: DataLoaderSection = section(DataLoaderSection)
    optimizer: Optimizer = section(Optimizer)
    hyperparameter: Hyperparameter = section(Hyperparameter)
    lr_scheduler: LRScheduler = section(LRScheduler)
    evaluator: Evaluator = section(Evaluator)
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS),
        metadata={"help": "validated", "each": METRICS},
    )
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
        return dataclasses.asdict(self)
