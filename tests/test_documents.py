"""What the documents say of the project: the tests, files and flags that they name exist."""

import importlib.util
import re
from pathlib import Path

import pytest

from configs.options import DataSet, load_config
from data_loader.tasks import get_task

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")])


def test_every_test_that_a_document_names_exists():
    files = {path.name: path.read_text() for path in (PROJECT / "tests").rglob("test_*.py")}
    named = {
        (document.name, *match)
        for document in DOCUMENTS
        for match in re.findall(r"(test_\w+\.py)::(\w+)", document.read_text())
    }
    assert named
    missing = [
        (document, file, name)
        for document, file, name in sorted(named)
        if not re.search(rf"^\s*(def|class) {name}\b", files.get(file, ""), re.MULTILINE)
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_configurations_that_it_names_exist(document):
    named = set(
        re.findall(
            r"\b(?:scripts|configs|docs)/[\w/.-]+\.(?:py|sh|json|slurm|md)\b", document.read_text()
        )
    )
    placeholders = {name for name in named if "NAME" in name}
    assert not [name for name in sorted(named - placeholders) if not (PROJECT / name).is_file()]


def test_the_tables_of_the_results_are_those_of_the_runs():
    file = PROJECT / "docs/results/headline.py"
    spec = importlib.util.spec_from_file_location("headline", file)
    headline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(headline)
    sets = {name: headline.read(*runs) for name, runs in headline.SETS.items()}
    text = (PROJECT / "docs/RESULTS.md").read_text()
    assert headline.goals_table(sets) in text
    assert headline.methods_table(sets) in text


def test_the_readmes_description_of_a_data_set_is_one(tmp_path):
    (found,) = re.findall(r"```json\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.json").write_text(found)
    config, ignored = load_config(tmp_path / "mine.json")
    classes = config.data.dataset.classes
    assert not ignored and [len(s) for s in get_task(config.task.name, "overlap", classes).steps] == [
        4,
        3,
    ]
    assert config.data.dataset.whole == [] and DataSet().whole == [10582, 1449]
