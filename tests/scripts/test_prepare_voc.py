"""From small archives in the true formats to a data root, and what mistakes with them end in."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from data_loader.data_root import DataRoot, read_label
from scripts import prepare_voc
from tests.helpers import PROJECT, code_of, error_line, run_script, snapshot, train_flags
from utils.errors import UserError
from utils.visualize import voc_palette

TAR, ZIP, TGZ = "VOCtrainval_11-May-2012.tar", "SegmentationClassAug.zip", "benchmark.tgz"
AUGMENTED, PLAIN, LISTS = "SegmentationClassAug", "SegmentationClass", "ImageSets/Segmentation"


def mat(label: np.ndarray) -> bytes:
    """A label in SBD's format, which has no void."""
    classes = np.where(label == 255, 0, label).astype(np.uint8)
    boundaries = np.empty((20, 1), dtype=object)
    for c in range(20):
        boundaries[c, 0] = csc_matrix(classes == c + 1, dtype=np.uint8)
    content = {
        "Segmentation": classes,
        "Boundaries": boundaries,
        "CategoriesPresent": np.unique(classes),
    }
    file = io.BytesIO()
    savemat(file, {"GTcls": content}, do_compression=True)
    return file.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> None:
    """Write a tar archive, compressed if its name says so."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def zipped(path: Path, files: dict[str, bytes]) -> None:
    """Write a zip archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def in_colour(data: bytes) -> bytes:
    """A palette label as an RGB one."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def truth(voc_root: Path) -> SimpleNamespace:
    """The synthetic data set as the archives' files; VOC itself has drawn its val and 20 of train."""
    labels = {path.stem: path.read_bytes() for path in (voc_root / AUGMENTED).glob("*.png")}
    photographs = {path.stem: path.read_bytes() for path in (voc_root / "JPEGImages").glob("*.jpg")}
    ids = sorted(labels)
    train, val = [i for i in ids if i[:4] == "2007"], [i for i in ids if i[:4] == "2008"]
    lists = {"train": train[:20], "val": val, "trainval": sorted(train[:20] + val)}
    voc = {f"JPEGImages/{i}.jpg": data for i, data in photographs.items()}
    voc |= {f"{PLAIN}/{i}.png": labels[i] for i in lists["trainval"]}
    voc |= {
        f"{LISTS}/{name}.txt": "".join(f"{i}\n" for i in ids).encode() for name, ids in lists.items()
    }
    voc |= {"Annotations/2007_000000.xml": b"<annotation/>", "SegmentationObject/2007_000000.png": b"?"}
    zip_files = {f"{AUGMENTED}/{i}.png": data for i, data in labels.items()}
    zip_files |= {f"__MACOSX/{AUGMENTED}/._{i}.png": b"\0\5\x16\7" for i in ids}
    decoded = {i: np.array(Image.open(io.BytesIO(data))) for i, data in labels.items()}
    in_sbd = train[5:] + val[:10]
    sbd = {f"cls/{i}.mat": mat(decoded[i]) for i in in_sbd} | {f"img/{train[5]}.jpg": b"\xff\xd8"}
    sbd |= {"train.txt": "\n".join(in_sbd[:40]).encode(), "val.txt": "\n".join(in_sbd[40:]).encode()}
    return SimpleNamespace(
        voc={f"VOCdevkit/VOC2012/{name}": data for name, data in voc.items()},
        zip=zip_files,
        sbd={f"benchmark_RELEASE/dataset/{name}": data for name, data in sbd.items()},
        labels=decoded, train=train, val=val, of_voc=set(lists["trainval"]),
    )  # fmt: skip


@pytest.fixture
def archives(truth: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder with VOC's tar and SegmentationClassAug.zip."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    tar(folder / TAR, truth.voc)
    zipped(folder / ZIP, truth.zip)
    return folder


@pytest.fixture
def prepared(truth: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder that was unpacked by hand, with all but the training list."""
    root = tmp_path / "VOC2012"
    unpacked(root, {**truth.voc, **{f"VOCdevkit/VOC2012/{k}": v for k, v in truth.zip.items()}})
    return root


def unpacked(root: Path, files: dict[str, bytes], prefix: str = "VOCdevkit/VOC2012/") -> None:
    """Write files below a folder, without a prefix of their names."""
    for name, data in files.items():
        path = root / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def run_process(root: Path, *arguments) -> subprocess.CompletedProcess:
    """Run the script as a user does, where there is no internet."""
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    return run_script("scripts/prepare_voc.py", "--root", root, *arguments, **nowhere)


@pytest.fixture
def prepare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., SimpleNamespace]:
    """Run the script in this process, which is quicker: returncode, stdout, stderr."""
    monkeypatch.setattr(prepare_voc, "cores", lambda: 0)

    def run(root, *arguments):
        capsys.readouterr()
        code = code_of(lambda: prepare_voc.main(["--root", str(root), *map(str, arguments)]))
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith(("error", "warning"))]  # no bars
        return SimpleNamespace(returncode=code, stdout=out, stderr="\n".join(lines))

    return run


def report(result: subprocess.CompletedProcess | SimpleNamespace) -> str:
    """What a run that succeeded printed; it fits a screen."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) <= 24 and "Training can start" in result.stdout
    return result.stdout


def assert_layout(root: Path, truth: SimpleNamespace, voids: bool = True) -> None:
    """The root has VOC's layout, lists and labels; voids: the labels that SBD has drawn have void."""
    lists = DataRoot(root).read_lists()
    assert (lists["train"].ids, lists["val"].ids) == (truth.train, truth.val)
    for images in lists.values():
        for name, path in zip(images.ids, images.labels, strict=True):
            label = truth.labels[name]
            if not voids and name not in truth.of_voc:
                label = np.where(label == 255, 0, label)
            assert np.array_equal(read_label(path), label)


def test_archives_as_they_circulate_to_a_trained_and_evaluated_step(archives, truth, tmp_path):
    root = tmp_path / "new" / "VOC2012"
    before = snapshot(archives)
    text = report(run_process(root, "--archives", archives))
    assert f"{archives / TAR}: 123 files taken" in text and f"{archives / ZIP}: 80 files taken" in text
    assert "60 lines instead of 10,582" in text and "20 lines instead of 1,449" in text
    assert_layout(root, truth)
    first = (root / LISTS / "train_aug.txt").read_text().splitlines()[0]
    assert first == "/JPEGImages/2007_000000.jpg /SegmentationClassAug/2007_000000.png"
    assert snapshot(archives) == before
    save_dir = tmp_path / "saved"
    flags = train_flags(root, save_dir, epochs=1)
    trained = run_script("train_voc.py", *flags)
    assert trained.returncode == 0, trained.stderr
    (checkpoint,) = save_dir.rglob("checkpoint-epoch1.pth")
    output = tmp_path / "metrics.json"
    evaluated = run_script("eval_voc.py", "-r", checkpoint, "--data_root", root, "--output", output)
    assert evaluated.returncode == 0, evaluated.stderr
    assert output.read_text() == (checkpoint.parent / "metrics.json").read_text()
    assert json.loads(output.read_text())["Mean_Intersection_over_Union"]["overall"] >= 0


def test_sbd_is_converted_and_vocs_own_labels_win(archives, truth, tmp_path):
    (archives / ZIP).unlink()
    tar(archives / TGZ, truth.sbd)
    root = tmp_path / "root"
    report(run_process(root, "--archives", archives))
    assert_layout(root, truth, voids=False)
    for name in truth.labels:
        with Image.open(root / AUGMENTED / f"{name}.png") as label:
            assert label.mode == "P"
            assert label.getpalette()[:63] == voc_palette()[:21].ravel().tolist()


def test_a_whole_root_is_only_checked_and_check_writes_nothing(archives, truth, tmp_path, prepare):
    root = tmp_path / "root"
    report(prepare(root, "--archives", archives))
    before = snapshot(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.*g")}
    for arguments in (["--archives", archives], ["--check"], []):
        assert "taken" not in report(prepare(root, *arguments))
    assert snapshot(tmp_path) == before
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*.*g")}
    (root / LISTS / "train_aug.txt").unlink()
    result = prepare(root, "--check")
    assert "training cannot start" in error_line(result)
    assert f"no list {root / LISTS / 'train_aug.txt'}" in result.stdout
    assert not (root / LISTS / "train_aug.txt").exists()
    assert "does not exist" in error_line(prepare(tmp_path / "nowhere", "--check"))
    assert not (tmp_path / "nowhere").exists()


def test_archives_that_are_unpacked_already(truth, tmp_path, prepare):
    folder = tmp_path / "downloads"
    unpacked(folder, truth.voc, "")
    unpacked(folder, truth.sbd, "")
    report(prepare(tmp_path / "root", "--archives", folder))
    assert_layout(tmp_path / "root", truth, voids=False)
    unpacked(tmp_path / "other", truth.voc, "")
    unpacked(tmp_path / "other", truth.zip, "")  # in the data root itself, beside VOCdevkit
    report(prepare(tmp_path / "other"))
    assert_layout(tmp_path / "other", truth)


def test_the_lists_of_another_year_are_not_taken(archives, truth, tmp_path, prepare):
    """They have the same names, and fewer images: those that val lacks would be trained on."""
    other = {f"VOCdevkit/VOC2009/{LISTS}/{name}.txt": b"2007_000001\n" for name in ("train", "val")}
    tar(archives / "VOCtrainval_11-May-2009.tar", other)
    unpacked(
        archives, {name.replace("2009", "2007"): data for name, data in other.items()}, "VOCdevkit/"
    )
    report(prepare(tmp_path / "root", "--archives", archives))
    assert_layout(tmp_path / "root", truth)


@pytest.mark.parametrize("size", ["killed", "torn"])
def test_a_run_that_was_stopped_goes_on(archives, truth, tmp_path, size):
    root = tmp_path / "root"
    if size == "torn":
        whole = (archives / TAR).read_bytes()
        (archives / TAR).write_bytes(whole[: len(whole) // 2])
        line = error_line(run_process(root, "--archives", archives))
        assert str(archives / TAR) in line and "fetch it again" in line
        (archives / TAR).write_bytes(whole)
    else:
        script = [sys.executable, "scripts/prepare_voc.py", "--root", root, "--archives", archives]
        process = subprocess.Popen(script, cwd=PROJECT, stderr=subprocess.PIPE)
        while len(list((root / "JPEGImages").glob("*.jpg"))) < 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = {path: path.stat().st_mtime_ns for path in root.rglob("2*.jpg")}
    assert 5 <= len(done) < 80
    report(run_process(root, "--archives", archives))
    assert_layout(root, truth)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert not list(root.rglob("*.unfinished"))


@pytest.mark.parametrize("kept", [0, 0.01, 0.6, 0.97])
@pytest.mark.parametrize("name", [TAR, ZIP, TGZ])
def test_part_of_an_archive_is_one_line(archives, truth, tmp_path, name, kept):
    tar(archives / TGZ, truth.sbd)
    data = (archives / name).read_bytes()
    (archives / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError) as refused:
        prepare_voc.prepare(tmp_path / "root", archives)
    assert str(refused.value).startswith(f"the archive {archives / name} is damaged or not complete (")


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "..\\x.png"])
@pytest.mark.parametrize("kind", ["bad.tar", "bad.zip"])
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path, kind, name):
    bad = tmp_path / "downloads" / f"VOC_{kind}"
    bad.parent.mkdir()
    {".tar": tar, ".zip": zipped}[bad.suffix](bad, {name: b"?"})
    with pytest.raises(UserError, match="would be written outside"):
        prepare_voc.prepare(tmp_path / "root", bad.parent)
    assert not list(tmp_path.rglob("x.png"))


def test_what_to_fetch_is_said_in_one_line(archives, tmp_path, prepare):
    line = error_line(run_process(tmp_path / "root"))
    assert f"cannot download {TAR} (" in line and f"into {tmp_path / 'root' / 'archives'}" in line
    assert all(name in line for name in (TAR, ZIP, TGZ))
    (archives / ZIP).unlink()
    line = error_line(prepare(tmp_path / "root", "--archives", archives))
    assert f"{archives} has not all that is needed" in line
    assert TAR not in line and ZIP in line and TGZ in line
    assert not (tmp_path / "root" / LISTS / "train_aug.txt").exists()
    assert "is no folder" in error_line(prepare(tmp_path / "root", "--archives", tmp_path / "none"))


def test_what_is_missing_is_downloaded(truth, tmp_path, monkeypatch):
    """torchvision's download is replaced: a file comes from a folder."""
    root, fetched = tmp_path / "root", []

    def fetch(url, folder, name, md5):
        fetched.append((url, md5))
        Path(folder).mkdir(parents=True, exist_ok=True)
        kind = TAR if TAR in name else TGZ
        tar(tmp_path / kind, truth.voc if kind == TAR else truth.sbd)
        (tmp_path / kind).rename(Path(folder) / name)

    monkeypatch.setattr(prepare_voc, "download_url", fetch)
    prepare_voc.prepare(root, None)
    assert_layout(root, truth, voids=False)
    assert [url.rpartition("/")[2] for url, _ in fetched] == [TAR, TGZ]
    assert sorted(path.name for path in (root / "archives").iterdir()) == [TAR, TGZ]


class TestMistakes:
    """Folders that were unpacked by hand, as people unpack them."""

    def test_no_training_list(self, prepared, truth, prepare):
        report(prepare(prepared))
        assert_layout(prepared, truth)

    @pytest.mark.parametrize(
        "place", [f"{AUGMENTED}/{AUGMENTED}", f"../{AUGMENTED}", f"../../{AUGMENTED}"]
    )
    def test_labels_in_another_folder(self, prepared, truth, tmp_path, place, prepare):
        home = tmp_path / "data" / "VOCdevkit" / "VOC2012"
        home.parent.mkdir(parents=True)
        prepared.rename(home)
        (home / AUGMENTED).rename(home / "moved")
        (home / place).parent.mkdir(exist_ok=True)
        (home / "moved").rename(home / place)
        root = tmp_path / "data" if place.startswith("../..") else home
        report(prepare(root))
        assert_layout(root, truth)

    def test_labels_in_colour(self, prepared, truth, prepare):
        originals = {}
        for path in [*(prepared / AUGMENTED).iterdir(), *(prepared / PLAIN).iterdir()]:
            path.write_bytes(in_colour(path.read_bytes()))
            originals[path.relative_to(prepared)] = path.read_bytes()
        text = report(prepare(prepared))
        assert "80 labels in colour converted" in text and "40 labels in colour converted" in text
        assert_layout(prepared, truth)
        kept = prepared / "labels_in_colour"
        assert all((kept / name).read_bytes() == data for name, data in originals.items())

    def test_colours_of_no_class_are_refused(self, prepared, truth, archives, prepare):
        path = prepared / AUGMENTED / f"{truth.train[7]}.png"
        colours = np.array(Image.open(path).convert("RGB"))
        colours[3, 4] = (128, 0, 1)
        Image.fromarray(colours).save(path)
        before = snapshot(prepared)
        line = error_line(prepare(prepared))
        assert f"the label {path} is a colour image, and its colour (128, 0, 1)" in line
        assert {**before, ".lock": snapshot(prepared)[".lock"]} == snapshot(prepared)
        zipped(archives / ZIP, {f"{AUGMENTED}/{path.name}": path.read_bytes()})
        line = error_line(prepare(prepared.parent / "root", "--archives", archives))
        assert f"{AUGMENTED}/{path.name} of {archives / ZIP}" in line and "(128, 0, 1)" in line

    def test_grey_labels_and_windows_line_ends(self, prepared, truth, prepare):
        for path in (prepared / AUGMENTED).iterdir():
            Image.fromarray(np.array(Image.open(path))).save(path)
        for path in (prepared / LISTS).iterdir():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        val = (prepared / LISTS / "val.txt").read_bytes()
        assert "60 grey" in report(prepare(prepared))
        assert_layout(prepared, truth)
        assert (prepared / LISTS / "val.txt").read_bytes() == val

    def test_val_list_from_the_others(self, prepared, truth, prepare):
        (prepared / LISTS / "val.txt").unlink()
        report(prepare(prepared))
        assert_layout(prepared, truth)

    def test_files_that_are_wrong_are_named_by_kind_and_left_alone(self, prepared, truth, prepare):
        paths = [prepared / AUGMENTED / f"{name}.png" for name in truth.train]
        for path in paths[20:32]:
            Image.fromarray(np.full_like(np.array(Image.open(path)), 77)).save(path)
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(paths[40])
        photograph = prepared / "JPEGImages" / f"{truth.train[50]}.jpg"
        photograph.write_bytes(photograph.read_bytes()[:-300])
        lists = prepared / LISTS
        (lists / "train_aug.txt").write_text("\n".join([*truth.train, truth.val[3]]))
        before = snapshot(prepared)
        result = prepare(prepared)
        assert "training cannot start" in error_line(result)
        assert f"problem: {paths[20]} has class id 77" in result.stdout
        assert "(and 11 more like it)" in result.stdout
        assert f"but its label {paths[40]} is 6x5" in result.stdout
        assert f"problem: cannot read the image {photograph}" in result.stdout
        assert "1 validation images are in the training list" in result.stdout
        assert "files that you delete" in result.stdout
        assert len(result.stdout.splitlines()) <= 24
        assert {**before, ".lock": snapshot(prepared)[".lock"]} == snapshot(prepared)


def test_help_has_an_example():
    result = run_script("scripts/prepare_voc.py", "--help")
    assert result.returncode == 0 and "--root data/VOC2012 --archives ~/Downloads" in result.stdout
