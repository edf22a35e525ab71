"""A sheet of real training composites of a step t >= 1, to see what EIR does to its images.

python scripts/preview_replay.py --output preview.png --task_name 15-1 --task_step 1
python scripts/preview_replay.py --output preview.png -c RUN/step_2/config.json --images 10

Columns: the image, its labels, with pseudo labels, with pasted instances, the pastes' label weight.
The step itself need not be trained, but the one before it is.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
import torch

from configs.options import parse_train
from data_loader.data_loaders import StepData
from data_loader.dataset import MEAN, STD
from trainer.incremental import IncrementalStep
from trainer.output import previous_checkpoint
from utils.checkpoint import write_atomically
from utils.config import Parser
from utils.distributed import launch
from utils.errors import UserError
from utils.visualize import VOID, sheet, voc_palette, with_legend

TITLES = ["image", "labels", "with pseudo labels", "with instances", "their weight, light: 1"]


def preview(config, call, options) -> None:
    if config.task.step < 1:
        raise UserError("step 0 replays nothing: give --task_step 1 or higher")
    if config.method != "eir":
        raise UserError(f"--method {config.method} pastes nothing: there is nothing to preview")
    if config.data.memory.replay != "eir":
        raise UserError(f"--replay {config.data.memory.replay} pastes nothing: leave it out")
    if not (1 <= options.images <= 1000 and 1 <= options.epoch <= 1_000_000):
        raise UserError("--images goes from 1 to 1000, --epoch from 1 to 1000000")
    if options.output.suffix.lower() != ".png":
        raise UserError(f"--output is {options.output}; give the name of a .png file")
    if not options.output.parent.is_dir():
        raise UserError(f"no folder {options.output.parent} to write {options.output.name} into")
    if call.unused:
        print(f"warning: without effect here: {', '.join(call.unused)}", file=sys.stderr)
    previous = previous_checkpoint(config, call)
    with tempfile.TemporaryDirectory() as folder:
        config.trainer.save_dir = folder  # the memory is drawn there again, the same as the step's
        _preview(config, previous, options)


def _preview(config, previous, options):
    config.data.train.batch_size, config.arch.args.freeze_all_bn = options.images, True
    trainer = IncrementalStep(config, StepData(config), previous=previous)
    trainer.prepare()
    colours = voc_palette()[[0, *trainer.data.task.order]]
    rows = [row for batch in first_batch(trainer, options) for row in pictures(trainer, batch, colours)]
    task, step = trainer.data.task, trainer.data.step
    names = dict(zip([0, *task.seen(step)], task.class_names(step), strict=True))
    picture = with_legend(sheet(rows, TITLES), {**names, VOID: "void"}, 20)
    write_atomically(options.output, lambda file: picture.save(file, "PNG"))
    print(f"{len(rows)} composites of step {trainer.data.step}: {options.output}")


def first_batch(trainer, options):
    """Half new images and half replay images of an epoch, as micro-batches."""
    new = len(trainer.data.training())
    order = np.random.default_rng(options.epoch).permutation(len(trainer.dataset))
    fresh, replayed = order[order < new], order[order >= new]
    half = min(len(replayed), options.images // 2)
    chosen = [*fresh[: options.images - half], *replayed[:half]]
    samples = [trainer.dataset[(options.epoch - 1, int(i))] for i in chosen]
    return trainer.to_device(torch.utils.data.default_collate(samples))


@torch.no_grad()
def pictures(trainer, batch, colours):
    """A row of pictures for each image of a micro-batch."""
    labels, _ = trainer.pseudo_label(batch)
    composite = trainer.compose(batch, labels)
    covered = composite.weights.sum(dim=1)
    table = voc_palette()
    table[: len(colours)] = colours
    for i in range(len(labels)):
        yield [
            photograph(batch.images[i]),
            table[batch.labels[i].cpu().numpy()],
            table[labels[i].cpu().numpy()],
            photograph(composite.images[i]),
            covered[i].cpu().numpy(),
        ]


def photograph(image: torch.Tensor) -> np.ndarray:
    """uint8 [H, W, 3] from a normalised image [3, H, W]."""
    pixels = image.cpu().permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = Parser(None, __doc__, epilog="further flags are those of train_voc.py")
    parser.add_argument("--output", type=utils.program.a_path, required=True, help="PNG to write")
    parser.add_argument("--images", type=int, default=6, help="composites, half of them replay images")
    parser.add_argument("--epoch", type=int, default=1, help="epoch whose randomness is shown")
    options, rest = parser.parse_known_args()
    config, call = parse_train(rest, program=parser.prog)
    config.multiprocessing_distributed = False
    launch(preview, config, call, options)


if __name__ == "__main__":
    main()
