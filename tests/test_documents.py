"""What the documents say of the project: the tests, files and flags that they name exist."""

import importlib.util
import re
from pathlib import Path

import pytest

from configs.options import DataSet, load_config
from data_loader.tasks import get_task
from scripts.results import Comparison

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


@pytest.fixture
def headline():
    spec = importlib.util.spec_from_file_location("headline", PROJECT / "docs/results/headline.py")
    headline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(headline)
    return headline


def test_the_tables_of_the_results_are_those_of_the_runs(headline):
    sets = {name: headline.read(*runs) for name, runs in headline.SETS.items()}
    text = (PROJECT / "docs/RESULTS.md").read_text()
    assert headline.goals_table(sets) in text
    assert headline.methods_table(sets) in text


def test_goals_ask_for_points_and_that_of_eir_for_each_seed(headline):
    numbers = {"EIR": (60, 70), "best EIR": (60, 70), "image replay": (61, 50)}
    runs = {
        method: [[{"seed": seed, "all": value}] for seed, value in enumerate(values)]
        for method, values in numbers.items()
    }
    comparison = Comparison(get_task("joint", "overlap"), runs, [], None, "", [])
    found = "65.0 against 55.5; -1.0, +20.0"
    assert headline.goal(comparison, "EIR", "image replay", 2) == f"**missed**: {found}"
    assert headline.goal(comparison, "best EIR", "image replay", 9.5) == f"reached: {found}"
    assert headline.goal(comparison, "best EIR", "image replay", 9.6) == f"**missed**: {found}"


def test_the_goal_of_the_gap_is_four_fifths(headline):
    def said(best):
        numbers = {"fine-tuning": 10, "best EIR": best, "joint": 60}
        runs = {method: [[{"seed": 1, "all": value}]] for method, value in numbers.items()}
        return headline.share(Comparison(get_task("joint", "overlap"), runs, [], None, "", []))

    assert said(50) == "reached: 80 %; 80"
    assert said(49) == "**missed**: 78 %; 78"


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
