"""Tasks: classes of each step, orders, label tables, and the choice of images."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from data_loader.tasks import ORDERS, SETTINGS, check_step, get_task
from tests.helpers import CLASS_NAMES
from utils.errors import UserError

ORDERS_SHA256 = "27949090e290c16a0ba14584de73f91a0683b93b0ca3f7960a3c6892d01b2f25"
STEPS = {
    "5-3": [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19, 20]],
    "15-1": [[*range(1, 16)], [16], [17], [18], [19], [20]],
    "15-5": [[*range(1, 16)], [16, 17, 18, 19, 20]],
    "19-1": [[*range(1, 20)], [20]],
    "10-10": [[*range(1, 11)], [*range(11, 21)]],
    "10-1": [[*range(1, 11)], *([c] for c in range(11, 21))],
    "10-5": [[*range(1, 11)], [11, 12, 13, 14, 15], [16, 17, 18, 19, 20]],
    "joint": [[*range(1, 21)]],
    "2-9": [[1, 2], [*range(3, 12)], [*range(12, 21)]],
    "15-1_b": [[12, 9, 20, 7, 15, 8, 14, 16, 5, 19, 4, 1, 13, 2, 11], [17], [3], [6], [18], [10]],
    "15-1_w": [[1, 2, 12, 14, 13, 19, 18, 7, 11, 20, 8, 4, 9, 16, 10], [3], [15], [6], [5], [17]],
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_hold_the_classes_of_the_task_in_learning_order(name):
    task = get_task(name, "overlap")
    assert [list(classes) for classes in task.steps] == STEPS[name]
    assert sorted(task.order) == list(range(1, 21))


def test_class_orders_are_the_published_ones():
    names = [f"15-1_{letter}" for letter in sorted(ORDERS)]
    orders = {name: list(get_task(name, "overlap").order) for name in names}
    assert len(orders) == 22
    assert all(sorted(order) == list(range(1, 21)) for order in orders.values())
    digest = hashlib.sha256(json.dumps(orders, sort_keys=True).encode()).hexdigest()
    assert digest == ORDERS_SHA256


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STEPS)
def test_label_tables_show_the_visible_classes_in_their_channels(name, setting):
    task, learned = get_task(name, setting), [c for classes in STEPS[name] for c in classes]
    for step, split in itertools.product(range(len(STEPS[name])), ("train", "val", "test")):
        visible = [c for classes in STEPS[name][: step + 1] for c in classes]
        if split == "train" and setting != "sequential":
            visible = STEPS[name][step]
        expected = [0] * 256
        expected[255] = 255
        for position, c in enumerate(learned):
            if c in visible:
                expected[c] = 1 + position
        table = task.label_table(task.visible(step, split))
        assert table.dtype == np.uint8
        assert table.tolist() == expected


def test_label_table_can_hide_classes_as_void():
    table = get_task("5-3", "overlap").label_table((6, 7, 8), hidden=255)
    assert table[:21].tolist() == [0, *[255] * 5, 6, 7, 8, *[255] * 12]


def test_channels_of_a_step_follow_the_learning_order_not_the_class_number():
    task = get_task("15-1_b", "overlap")
    assert task.channels(0) == list(range(1, 16))
    assert task.channels(1) == [16]
    assert task.class_names(1)[16] == CLASS_NAMES[17]
    assert task.class_names(0)[:3] == ["background", "dog", "chair"]
    assert len(task.class_names(2)) == 18


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STEPS)
def test_images_of_a_step_against_set_arithmetic(name, setting):
    task, rng = get_task(name, setting), np.random.default_rng(0)
    present = rng.random((200, 21)) < 0.08
    present[0] = np.arange(21) == 0  # background alone
    present[1] = True
    shows = [{c for c in range(1, 21) if row[c]} for row in present]
    for step, classes in enumerate(STEPS[name]):
        now, seen = set(classes), {c for earlier in STEPS[name][: step + 1] for c in earlier}
        whole = setting == "overlap"
        expected = {
            "train": [i for i, s in enumerate(shows) if s & now and (whole or s <= seen)],
            "val": [i for i, s in enumerate(shows) if s & now],
            "test": [i for i, s in enumerate(shows) if s & seen],
        }
        for split, images in expected.items():
            assert task.select(step, split, present).tolist() == images, (step, split)


@pytest.mark.parametrize("name", ["5-3-60", "5-3-140", "5-3-180"])
def test_the_releases_other_names_of_5_3(name):
    assert [list(classes) for classes in get_task(name, "overlap").steps] == STEPS["5-3"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "15",
        "15-3",
        "0-5",
        "5-0",
        "20-0",
        "15-05",
        "015-5",
        "21-1",
        "15-1_a",
        "15-1_x",
        "10-1_b",
        "15-1_bb",
        "5-3-70",
        "²-1",
        "9" * 5000,
    ],
)
def test_unknown_tasks_are_refused_with_those_that_exist(name):
    with pytest.raises(UserError) as refused:
        get_task(name, "overlap")
    assert repr(name)[:100] in str(refused.value)
    for known in ("19-1", "15-5", "15-1", "10-1", "10-5", "10-10", "5-3", "joint", "15-1_b"):
        assert known in str(refused.value)


def test_unknown_settings_are_refused_with_those_that_exist():
    with pytest.raises(UserError, match="overlap, disjoint, sequential"):
        get_task("15-5", "overlapped")


@pytest.mark.parametrize("step", [-1, 6, 100])
def test_unknown_steps_are_refused_with_those_that_exist(step):
    with pytest.raises(UserError, match=f"no step {step}: its steps are 0 to 5"):
        check_step(get_task("5-3", "overlap"), step)
