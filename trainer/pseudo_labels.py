"""What the teacher believes the background of new images to be (METHOD 5, 1)."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from data_loader.data_loaders import EvalBatches, make_loader
from data_loader.data_root import read_label
from data_loader.dataset import TrainDataset, normalize
from data_loader.memory import beside
from data_loader.transforms import BILINEAR
from models.deeplabv3 import upsample_logits
from utils.checkpoint import cannot_write, read_json_object, write_atomically, write_json
from utils.distributed import barrier, rank, world_size
from utils.errors import UserError
from utils.logging import log, progress
from utils.visualize import VOID, label_image


def pseudo_labels(labels: torch.Tensor, teacher: torch.Tensor, threshold: float) -> torch.Tensor:
    """Labels uint8 [N, H, W] in which background takes the teacher's confident classes.

    teacher: logits [N, S, h, w] at stride 16. A background pixel takes the arg max channel of the
    sigmoid scores if that is foreground and its score reaches the threshold (METHOD 5, 1).
    Goes image by image, so that full-size logits of the batch never exist together.
    """
    filled = torch.empty_like(labels)
    for i, label in enumerate(labels):
        best, channel = upsample_logits(teacher[i : i + 1].float(), label.shape)[0].max(dim=0)
        confident = (label == 0) & (channel > 0) & (best.sigmoid() >= threshold)
        filled[i] = torch.where(confident, channel.to(labels.dtype), label)
    return filled


def ignore_doubtful(
    labels: torch.Tensor, teacher: torch.Tensor, threshold: float, weights: torch.Tensor
) -> torch.Tensor:
    """Labels uint8 [N, H, W] in which background that may be an old class is void.

    Void becomes background that has no pseudo label and no pasted instance (weights float
    [N, K, H, W], as in Composite), and where an old class scores the threshold or more, even if the
    background scores higher. teacher as in pseudo_labels.
    Such pixels leave the BCE, but stay in its divisor: the weight of all other pixels, and of the
    distillation beside them, does not depend on how many are doubtful.
    """
    kept = torch.empty_like(labels)
    for i, label in enumerate(labels):
        logits = upsample_logits(teacher[i : i + 1].float(), label.shape)[0]
        score = logits[1:].amax(dim=0).sigmoid()
        free = (label == 0) & (weights[i].sum(dim=0) == 0)
        kept[i] = torch.where(free & (score >= threshold), VOID, label)
    return kept


# Pseudo labels of whole images (--pseudo_labels image), which are no part of the paper.


class WholeImages(Dataset):
    """The images of a training set that have a background, each once, at the evaluation's scale."""

    def __init__(self, dataset: TrainDataset, shorter: int):
        """shorter: the length that the shorter side gets, in pixels."""
        self.dataset, self.shorter = dataset, shorter
        count = len(dataset.images) if dataset.memory and dataset.memory.alone else len(dataset)
        self.names = [dataset.name(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict:
        """image uint8 [3, h, w], size of the original (H, W), name str as in TrainDataset."""
        image, label, _ = self.dataset.load(i)
        image = F.resize(image, [self.shorter], interpolation=BILINEAR, antialias=True)
        return {"image": image, "size": tuple(label.shape), "name": self.names[i]}


class ImageLabels:
    """Stored pseudo labels: called with a sample's name and size, gives those of the whole image."""

    def __init__(self, folder: Path, table: np.ndarray):
        """table: uint8 [256] from class ids, which the files have, to channels."""
        self.folder, self.table = folder, table

    def __call__(self, name: str, size: tuple[int, int]) -> torch.Tensor:
        """uint8 [H, W], channels, 0 where there is none; UserError if it has not the image's size."""
        path = self.folder / f"{name}.png"
        label = self.table[read_label(path)]
        if label.shape != tuple(size):
            raise UserError(f"the pseudo label {path} has not its image's size: remove {self.folder}")
        return torch.from_numpy(label)


@torch.no_grad()
def store_pseudo_labels(
    folder: Path,
    images: WholeImages,
    teach: Callable[[torch.Tensor], torch.Tensor],
    order: tuple[int, ...],
    threshold: float,
    made_from: dict[str, str],
    device: torch.device,
    workers: int,
) -> Path:
    """Write what the teacher sees in each whole image as a palette PNG of class ids, <name>.png.

    Returns where they are: in the folder, if it has those that were made from the same, with the same
    threshold and at the same size, of which each file stays; else beside it, where
    `put_in_place` can take them from, and where another call goes on with them.

    teach: from normalised images [N, 3, h, w] to logits at stride 16; order: the class id of each
    channel from 1 on; threshold: as in pseudo_labels; made_from: digests of teacher, data and
    memory, and the precision. The images are shared by the processes.
    """
    made_from = {**made_from, "threshold": threshold, "shorter_side": images.shorter}
    if read_json_object(folder / "made_from.json") != made_from:
        folder = beside(folder)
    barrier()  # no process writes before all have looked
    if rank() == 0 and read_json_object(folder / "made_from.json") != made_from:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            for place in {folder, *((folder / name).parent for name in images.names)}:
                place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from None
        write_json(folder / "made_from.json", made_from)
    barrier()
    missing = [i for i, name in enumerate(images.names) if not (folder / f"{name}.png").is_file()]
    todo = torch.utils.data.Subset(images, missing)
    barrier()  # no process writes before all have looked
    if missing:
        log.info(f"making pseudo labels of {len(missing)} whole images")
    ids = np.array([0, *order], dtype=np.uint8)
    loader = make_loader(todo, EvalBatches(len(todo), 1, rank(), world_size()), workers, pin=True)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        for sample in progress(loader, "pseudo labels"):
            logits = teach(normalize(sample["image"].to(device, non_blocking=True)))
            empty = torch.zeros(1, *map(int, sample["size"]), dtype=torch.uint8, device=device)
            seen = ids[pseudo_labels(empty, logits, threshold)[0].cpu().numpy()]
            file = io.BytesIO()
            label_image(seen).save(file, "PNG")
            path = folder / f"{sample['name'][0]}.png"
            write_atomically(path, lambda out, file=file: out.write(file.getbuffer()))
    barrier()
    return folder
