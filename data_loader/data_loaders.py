"""Loaders: which samples form which batch in which process."""

import collections
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from configs.options import Config, MemoryArgs
from data_loader.data_root import DataRoot, in_both
from data_loader.dataset import LabelledImages
from data_loader.memory import Memory, Source, draw_memory
from data_loader.tasks import check_step, task_of
from data_loader.transforms import EvalTransform, TrainTransform, whole
from utils.distributed import barrier, first_process_first, gather, loader_processes, rank
from utils.errors import UserError
from utils.logging import log
from utils.visualize import VOID


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one process.

    An epoch's order depends on (seed, epoch) alone. The batches of all processes together are that
    order cut into pieces of batch_size * processes; the last incomplete piece is dropped, unless
    it is the only one, which is then shared out evenly.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1):
        self.samples, self.seed, self.rank, self.processes = samples, seed, rank, processes
        self.total = min(batch_size * processes, samples)
        if self.total < processes:
            raise UserError(
                f"{samples} training images cannot be shared by {processes} processes: use fewer"
            )
        if self.total < batch_size * processes:
            log.warning(
                f"only {samples} training images: one batch of {samples} instead of "
                f"{batch_size * processes}"
            )
        self.epoch = 0

    def __len__(self) -> int:
        return self.samples // self.total

    def sizes(self) -> list[int]:
        """Batch size of each process."""
        return [len(part) for part in np.array_split(np.arange(self.total), self.processes)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        for b in range(len(self)):
            batch = order[b * self.total : (b + 1) * self.total]
            mine = np.array_split(batch, self.processes)[self.rank]
            yield [(self.epoch, int(i)) for i in mine]


class EvalBatches(Sampler[list[int]]):
    """Batches fixed by the images' index in the whole split; process r takes every r-th of them."""

    def __init__(self, samples: int, batch_size: int, rank: int = 0, processes: int = 1):
        starts = range(0, samples, batch_size)[rank::processes]
        self.batches = [list(range(s, min(s + batch_size, samples))) for s in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def make_loader(dataset: Dataset, batches: Sampler, workers: int, pin: bool) -> DataLoader:
    """A loader over those batches, its workers kept from epoch to epoch.

    It draws its workers' seeds from a generator of its own, so that nothing else draws other numbers.
    """
    workers = _clipped(workers, cores())
    return DataLoader(
        dataset,
        batch_sampler=batches,
        **loader_processes(workers),
        pin_memory=pin and torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


@functools.cache  # so that it is said once, and not again for each evaluation
def _clipped(workers, available):
    """As many of the workers as there are cores available; a warning where these are fewer."""
    if workers > available:
        log.warning(
            f"{available} loader processes instead of {workers} (--num_workers): this process may use "
            f"{available} of the machine's cores"
        )
    return min(workers, available)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class StepData:
    """The images and labels of one step of a task, from the folder of its data set."""

    def __init__(self, config: Config):
        self.config, self.seed = config.data, config.seed
        self.set = config.data.dataset
        self.task = task_of(self.config)
        self.step = config.task.step
        check_step(self.task, self.step)
        self.root = DataRoot(self.config.data_root, config.task.idxs_path, self.set)
        self.lists = self.root.read_lists(self.config.allow_val_in_train)
        self.indices = {
            name: first_process_first(lambda images=images: self.root.index(images, cores()))
            for name, images in self.lists.items()
        }
        # a test's images are chosen from the validation list too
        self.lists["test"], self.indices["test"] = self.lists["val"], self.indices["val"]

    def _other_index(self):
        """Ids of the validation images with a label in both folders, and the index of the labels that
        are not used; None where there are none.

        What is wrong with labels that are not used stops nothing: it is returned, for the log.
        """
        try:
            other = self.root.other_labels(self.lists["val"])
            return (other.ids, self.root.index(other, cores())) if other.ids else None
        except UserError as error:
            return error

    def describe(self) -> None:
        """Write to the log where images and labels come from, and what is doubtful about them.

        To be called by all processes.
        """
        train, val = self.lists["train"], self.lists["val"]
        counts = [len(train.ids), len(val.ids)]
        if self.set.whole and counts != self.set.whole:
            found, whole = (f"{a:,} and {b:,}" for a, b in (counts, self.set.whole))
            log.info(f"training and validation images: {found} (the whole of {self.set.name}: {whole})")
        both = in_both(train, val)
        if both:
            log.warning(f"{len(both)} validation images are trained on, {both[0]} first")
        for name, files in (("training", train), ("validation", val)):
            folders = collections.Counter(label.parent.name for label in files.labels)
            counts = ", ".join(f"{folder} ({count})" for folder, count in folders.items())
            log.info(f"labels of the {name} images: {counts}")
        if self.set.zero == "background" and not self.indices["train"].pixels[:, 0].any():
            log.warning("no training label has id 0, the background: are all ids too high by one?")
        self._describe_other_labels()
        self._describe_lacking_classes()

    def _describe_other_labels(self):
        """Warn of validation images whose labels in the two label folders differ."""
        other = first_process_first(self._other_index)
        if isinstance(other, UserError):
            log.warning(f"among labels of validation images that are not used: {other}")
        elif other:
            ids, index = other
            val = self.lists["val"]
            row = {name: i for i, name in enumerate(val.ids)}
            used = self.indices["val"].present[[row[name] for name in ids]]
            differs = np.flatnonzero((used != index.present).any(axis=1))
            if len(differs):
                log.warning(
                    f"{len(differs)} validation images have labels with other classes in another "
                    f"label folder, {ids[differs[0]]} first: "
                    f"{val.labels[row[ids[differs[0]]]].parent} is used"
                )

    def _describe_lacking_classes(self):
        """Warn of classes that this step cannot learn, or that its test cannot show."""
        lacking = self._without_image("train", self.task.steps[self.step])
        if lacking:
            log.warning(
                f"no training image of step {self.step} shows {lacking}: the model cannot learn what "
                "it never sees"
            )
        lacking = self._without_image("test", self.task.seen(self.step))
        if lacking:
            log.warning(
                f"no test image shows {lacking}: an IoU of 0 is no error of the model there, "
                "and the means count it"
            )

    def _without_image(self, split, classes):
        """Names of those of the classes that no image of a split of this step shows."""
        shown = self.indices[split].present[self.select(split)].any(axis=0)
        return ", ".join(self.task.named(c for c in classes if not shown[c]))

    def never_shown(self) -> list[str]:
        """Names of the classes seen so far whose label no training image of any step so far shows."""
        shown = set()
        for step in range(self.step + 1):
            present = self.indices["train"].present[self.select("train", step)].any(axis=0)
            shown |= {c for c in self.task.visible(step, "train") if present[c]}
        return self.task.named(c for c in self.task.seen(self.step) if c not in shown)

    @property
    def classes(self) -> list[int]:
        """Number of classes of each step so far, as DeepLabV3 takes them."""
        return [len(classes) for classes in self.task.steps[: self.step + 1]]

    @property
    def class_names(self) -> list[str]:
        return self.task.class_names(self.step)

    @property
    def groups(self) -> tuple[list[int], list[int]]:
        """As Task.groups."""
        return self.task.groups(self.step)

    def select(self, split: str, step: int | None = None) -> np.ndarray:
        """Indices, into the list, of the images of a split (train, val, test)."""
        step = self.step if step is None else step
        return self.task.select(step, split, self.indices[split].present)

    def digest(self, split: str) -> str:
        """A digest of the images of the list `train` or `val`, by their ids, and of their labels."""
        return self.indices[split].digest("\n".join(self.lists[split].ids))

    def training(self) -> LabelledImages:
        """The training images of this step with the train transform, before replay is added."""
        dataset = self._dataset("train", TrainTransform(_crop(self.config.train)))
        if not len(dataset):
            names = ", ".join(self.task.named(self.task.steps[self.step]))
            raise UserError(
                f"step {self.step} of {self.task.name} ({self.task.setting}) has no training image "
                f"in {self.root.root}: none shows {names}"
            )
        return dataset

    def previous_training(self) -> LabelledImages:
        """The training images of step t-1 as a test shows images, with the labels visible then."""
        return self._dataset("train", EvalTransform(_crop(self.config.train)), self.step - 1)

    def evaluation(self, split: str) -> tuple[LabelledImages, int]:
        """Dataset of val or test, and its batch size: 1 for whole images, whose sizes differ."""
        settings = getattr(self.config, split)
        if not settings.args.transform:
            return self._dataset(split, whole), 1
        return self._dataset(split, EvalTransform(_crop(settings))), settings.batch_size

    def memory(
        self,
        folder: Path,
        previous: Path | None,
        anew: bool = False,
        seen: Callable[[], list[set[int]]] | None = None,
    ) -> Memory | None:
        """The memory of this step, drawn beside `folder` unless it is there; None without replay.

        previous: folder of the memory of step t-1. anew: draw it even if it is there. seen: as in
        Source, called where there is a draw. The first process draws, the others read.
        """
        settings = self.config.memory
        if settings.replay == "none" or settings.mem_size == 0:
            return None
        drawn = None
        if rank() == 0:
            drawn = self.draw(self.step, settings, self.seed, folder, previous, anew, seen)
        barrier()
        memory = Memory(gather(drawn)[0], self.task.label_table(self.task.seen(self.step - 1)))
        if not len(memory):
            log.warning("the memory is empty: this step trains without replay")
        return memory if len(memory) else None

    def draw(
        self,
        step: int,
        settings: MemoryArgs,
        seed: int,
        folder: Path,
        previous: Path | None,
        anew: bool,
        seen: Callable[[], list[set[int]]] | None = None,
    ) -> Path:
        """Draw the memory of a step >= 1 with these settings; see draw_memory for what is returned."""
        before = step - 1
        if previous and not previous.is_dir():
            names = ", ".join(self.task.named(self.task.steps[before]))
            if before:
                log.warning(f"no memory in {previous}: only {names} can be drawn")
            previous = None
        visible, old = self.task.visible(before, "train"), self.task.seen(before)
        chosen = self.select("train", before)
        names = dict(self.task.names)
        files, index = self.lists["train"], self.indices["train"]
        source = Source(files, index, chosen, visible, previous, names, seen)
        kind = "image" if settings.replay == "image" else "instance"
        return draw_memory(
            folder, source, old, kind, settings.mem_size, seed, settings.surroundings, anew
        )

    def _dataset(self, split, transform, step=None):
        step = self.step if step is None else step
        files = self.lists[split]
        hidden = getattr(self.config, split).args.masking_value
        table = self.task.label_table(self.task.visible(step, split), hidden)
        if self.set.zero == "void":
            table[0] = VOID
        chosen = self.select(split, step)
        ids, images, labels = (
            [column[i] for i in chosen] for column in (files.ids, files.images, files.labels)
        )
        return LabelledImages(ids, images, labels, table, transform)


def _crop(settings):
    return settings.args.transform_args.crop_size
