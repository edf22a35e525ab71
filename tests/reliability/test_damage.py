"""A file that is damaged gives the result that it would have given, or one line that names it."""

import random
import shutil

import pytest

from tests.helpers import snapshot
from tests.reliability.runs import RUN, STEP_1, copy, flags, refused, result, run, two_at_a_time

pytestmark = pytest.mark.slow
STEP = f"models/{RUN}/step_1"
BEFORE = f"models/{RUN}/step_0"
LOG = f"log/{RUN}/step_1"
PNG = f"{STEP}/memory/000_*_image.png"

HALFWAY = [
    f"{STEP}/config.json",
    f"{STEP}/made_from.json",
    f"{STEP}/last.pth",
    f"{STEP}/memory/manifest.json",
    PNG,
    f"{STEP}/memory",
    f"{LOG}/metrics.jsonl",
    f"{LOG}/log.txt",
    f"{BEFORE}/config.json",
    f"{BEFORE}/made_from.json",
    f"{BEFORE}/metrics.json",
    f"{BEFORE}/checkpoint-epoch2.pth",
]
FINISHED = [
    f"{STEP}/config.json",
    f"{STEP}/made_from.json",
    f"{STEP}/metrics.json",
    f"{STEP}/last.pth",
    f"{STEP}/checkpoint-epoch2.pth",
    f"{STEP}/memory/manifest.json",
    PNG,
    f"{BEFORE}/checkpoint-epoch2.pth",
]


def truncate(path, other, draw):
    _write(path, path.read_bytes()[: draw.randrange(1, path.stat().st_size)])


def flip(path, other, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    _write(path, bytes(content))


def empty(path, other, draw):
    _write(path, b"")


def swap(path, other, draw):
    """The file of another run in its place."""
    _remove(path)
    (shutil.copytree if other.is_dir() else shutil.copy2)(other, path)


def wrong_type(path, other, draw):
    """A folder in place of a file, a file in place of a folder."""
    folder = path.is_dir()
    _remove(path)
    path.touch() if folder else path.mkdir()


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write(path, content):
    path.unlink()  # it may be a link to the file of the undisturbed run
    path.write_bytes(content)


DAMAGES = [truncate, flip, flip, flip, empty, swap, wrong_type]


def disturb(root, start, other, place, files, judge):
    """Damage a file in a copy of `start` and run the same command, for all files and damages.

    judge(damaged path, files before, folder, error line or None) returns what is wrong, or None.
    Returns how many were refused, how many not, and all that is wrong.
    """
    cases = [
        (name, number, damage)
        for name in files
        for number, damage in enumerate(DAMAGES)
        if "." in name or damage in (swap, wrong_type)  # memory is a folder
    ]

    def one(case):
        name, number, damage = case
        saved = copy(start, place / f"{number} {name}".replace("/", " ") / "saved")
        path = next(saved.glob(name))
        damage(path, next(other.folder.glob(name)), random.Random(f"{name} {number}"))
        damaged, before = str(path.relative_to(saved)), snapshot(saved)
        outcome = run([*flags(root, saved, **STEP_1), "--resume", "auto"])
        try:
            error = refused(outcome)
            wrong = judge(damaged, before, saved, error)
        except AssertionError as failure:
            error, wrong = None, str(failure)
        shutil.rmtree(saved.parent)
        return error is not None, wrong and f"{damage.__name__} {number} of {damaged}: {wrong}"

    ends = two_at_a_time(one, cases)
    errors = sum(error for error, _ in ends)
    return errors, len(ends) - errors, [wrong for _, wrong in ends if wrong]


def good_files(files, damaged):
    """The files that were not damaged, without those that any run writes to (--save_dir is another)."""
    written = [f"{STEP}/{name}" for name in (".lock", "config.json", "made_from.json")]
    changing = [*written, f"{LOG}/log.txt", f"{LOG}/metrics.jsonl"]
    return {
        name: digest
        for name, digest in files.items()
        if not name.startswith(damaged) and name not in changing
    }


def without(found, damaged):
    """A result without what was damaged, and cannot be as it was."""
    name = damaged.removeprefix(f"{STEP}/").removeprefix(f"{LOG}/")
    return {key: value for key, value in found.items() if key != name}


def changed_good_file(before, saved, damaged):
    """The first file that was good, and is no more what it was."""
    after = good_files(snapshot(saved), damaged)
    for name, digest in good_files(before, damaged).items():
        if after.get(name) != digest:
            return f"{name} is no more what it was"


def test_damage_halfway_through_a_step(root, halfway, step_1, other, place):
    """Each file that the rest of the step reads, of the step and of the one before it."""

    def judge(damaged, before, saved, error):
        if error is not None:
            return changed_good_file(before, saved, damaged)
        # a record of the log can only be lost; all else comes out as undisturbed
        lost = damaged if damaged.startswith(LOG) else ""
        if without(result(saved), lost) != without(step_1.result, lost):
            return "another result"

    errors, same, wrong = disturb(root, halfway, other, place, HALFWAY, judge)
    print(f"damage halfway: {errors} refused, {same} with the same result")
    assert not wrong


def test_damage_of_a_finished_step(root, step_1, other, place):
    """What is wrong is refused here, or by whoever reads it: the next step."""

    def judge(damaged, before, saved, error):
        if error is not None:
            return changed_good_file(before, saved, damaged)
        found = result(saved)
        if found == step_1.result:
            return None
        if without(found, damaged) != without(step_1.result, damaged):
            return "another result"
        if damaged == f"{STEP}/last.pth":  # nobody reads it any more
            return None
        line = refused(run(flags(root, saved, **{**STEP_1, "task_step": 2})))
        if line is None and result(saved) != step_1.result:  # a memory may be drawn again, the same one
            return "the next step took it"

    errors, same, wrong = disturb(root, step_1.folder, other, place, FINISHED, judge)
    print(f"damage of a finished step: {errors} refused, {same} with the same result or refused later")
    assert not wrong


def test_a_damaged_checkpoint_is_not_evaluated(root, step_1, other, place):
    for number, damage in enumerate((truncate, empty, wrong_type)):
        saved = copy(step_1.folder, place / f"{number}" / "saved")
        path = saved / STEP / "checkpoint-epoch2.pth"
        damage(path, None, random.Random(number))
        outcome = run(["-r", str(path), "--save_dir", str(saved)], command="eval")
        assert str(path) in refused(outcome)
