"""Whatever a command line or a file says: it is read, or refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.options import Config, EvalCall, TrainCall, load_config, read_eval, read_train
from data_loader.data_root import DataRoot
from data_loader.memory import MANIFEST, Memory
from tests.helpers import small_config
from tests.reliability.runs import RUN
from trainer.output import check_not_stale, has_results, is_finished, where_to_start
from utils.checkpoint import json_digest
from utils.config import options
from utils.errors import UserError

pytestmark = pytest.mark.slow

FLAGS = [
    flag for cls in (Config, TrainCall, EvalCall) for o in options(cls) for flag in o.metadata["flags"]
]
PATHS = [o.path for o in options(Config)]
# Values that programs trip over, among any text.
ODD = [
    "", " ", "-", "--", "-1", "0", "1", "1e308", "1e309", "nan", "inf", "-inf", "0x10", "1_000",
    "9" * 5000, "on", "off", "none", "auto", "true", "~nouser", "~nouser/x", "../x", "/",
    "/dev/null", "a" * 5000, "15-1", "5-3",
    "19-99999999999999999999", "²-²", "٣-٣", "15-1_z", "joint", "tiny", "eir", "x\ny",
    "\udc80", "\x00", "$(x)", "tcp://", "0,1", "0,,1",
]  # fmt: skip
TEXTS = st.sampled_from(ODD) | st.text(st.characters(), max_size=12)
NUMBERS = st.integers() | st.floats() | st.just(10**400) | st.integers(-3, 300)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def cases(number):
    """That many cases, the same ones each time."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def accepts(read):
    """The value of read(), or None where it is refused as it should be, in one line."""
    try:
        return read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        return None


WORDS = st.lists(
    st.sampled_from(FLAGS) | TEXTS | st.builds("{}={}".format, st.sampled_from(FLAGS), TEXTS)
)


@cases(500)
@given(WORDS)
def test_command_line_of_training(words):
    # --help prints and leaves, which is no error
    accepts(lambda: read_train([word for word in words if word not in ("-h", "--help")]))


@cases(250)
@given(WORDS)
def test_command_line_of_evaluation(words):
    accepts(lambda: read_eval([word for word in words if word not in ("-h", "--help")]))


def nested(path, value):
    """The JSON object that holds one value at a path of names."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@cases(400)
@given(st.builds(nested, st.sampled_from(PATHS) | TEXTS, VALUES) | VALUES)
def test_configuration_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(content))
    accepts(lambda: load_config(path))


@cases(150)
@given(st.binary(max_size=60) | st.integers(1, 100_000).map(lambda n: b"[" * n))
def test_configuration_file_that_is_no_json(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    accepts(lambda: load_config(path))


@pytest.fixture(scope="module")
def memory(step_1, tmp_path_factory) -> Path:
    """A stored memory that may be changed."""
    stored = step_1.folder / "models" / RUN / "step_1" / "memory"
    return Path(shutil.copytree(stored, tmp_path_factory.mktemp("fuzz") / "memory"))


@cases(400)
@given(data=st.data())
def test_manifest(memory, step_1, data):
    """One value of a manifest becomes another one; with its digest, without one, with a new one."""
    original = step_1.folder / "models" / RUN / "step_1" / "memory" / MANIFEST
    manifest = json.loads(original.read_text())
    place = manifest
    if data.draw(st.booleans()):
        place = manifest["entries"][data.draw(st.integers(0, len(manifest["entries"]) - 1))]
    name = data.draw(st.sampled_from([*place]) | TEXTS)
    before, place[name] = place.get(name), data.draw(VALUES)
    signed = data.draw(st.sampled_from(["old", "none", "new"]))
    stored = manifest.pop("sha256", None)
    if signed != "none":
        manifest["sha256"] = stored if signed == "old" else json_digest(manifest)
    (memory / MANIFEST).write_text(json.dumps(manifest))

    def read():
        loaded = Memory(memory, np.arange(256, dtype=np.uint8))
        return [loaded.replay(i) for i in range(len(loaded))]

    taken = accepts(read)
    if signed == "old" and name != "sha256" and place[name] != before:
        assert taken is None


@cases(300)
@given(
    st.sampled_from(["made_from.json", "metrics.json", "config.json"]),
    st.dictionaries(
        st.sampled_from(["previous", "own_previous", "batch", "final", "metrics", "x"]), VALUES
    )
    | VALUES
    | st.builds(nested, st.sampled_from(["Pixel_Accuracy", "Mean_Intersection_over_Union"]), VALUES),
)
def test_records_of_a_step(root, step_1, tmp_path_factory, name, content):
    """Every question that a call asks of a step's folder before it trains."""
    save_dir = tmp_path_factory.getbasetemp() / "fuzzed_step"
    config = small_config(root, save_dir, task_step=1, mem_size=4, lr=0.001, freeze_bn=True)
    for step in (0, 1):
        folder = config.step_dir(step)
        if not folder.is_dir():
            shutil.copytree(step_1.folder / "models" / RUN / f"step_{step}", folder)
    folder = config.step_dir()
    original = (folder / name).read_text()
    (folder / name).write_text(json.dumps(content))
    try:
        accepts(lambda: is_finished(config, 1))
        accepts(lambda: check_not_stale(config, 1))
        accepts(lambda: where_to_start(config, TrainCall(resume="auto")))
        if name == "metrics.json":
            assert not has_results(folder) or content == json.loads(original)
    finally:
        (folder / name).write_text(original)


LINES = st.lists(
    st.sampled_from(
        [
            "2007_000001", "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png",
            "../x", "/../x.jpg /../x.png", "/etc/passwd /etc/passwd", "a b c", "\x00", "a" * 300, ".",
            "/", "",
        ]
    )
    | TEXTS
)  # fmt: skip


@cases(200)
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n", "\r", " "]))
def test_list_of_images(root, tmp_path_factory, lines, end):
    fuzzed = tmp_path_factory.getbasetemp() / "fuzzed_voc"
    if not fuzzed.is_dir():
        shutil.copytree(root, fuzzed)
    text = end.join(lines).encode(errors="surrogatepass")
    (fuzzed / "ImageSets/Segmentation/train_aug.txt").write_bytes(text)
    accepts(lambda: DataRoot(fuzzed).read_list("train"))
