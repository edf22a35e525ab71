"""The tables of goals and methods of docs/RESULTS.md, and docs/figures/headline.png, from the runs.

python docs/results/headline.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.program  # noqa: F401

import numpy as np
from matplotlib.figure import Figure

from scripts.report import draw_mean_iou, markdown, mean_and_deviation, save
from scripts.results import Comparison, read_comparisons
from utils.config import Parser

ROOT = Path(__file__).resolve().parents[2]

METHODS = (
    "fine-tuning", "pseudo labels + distillation", "DKD", "DKD-M", "instance replay", "image replay",
    "EIR", "EIR plus", "best EIR", "joint",
)  # fmt: skip
ON_PHOTOGRAPHS, ON_PAINTED = "EIR, surroundings, all, warm-up", "EIR plus, all"

# What stands over a column of the table -> the best EIR there, and the folders of its runs in
# docs/results. Of several runs with one seed the first that has all steps counts; so it is DKD-M's at
# half the learning rate, of photographs_animals_dkd, and not that of photographs_animals.
SETS = {
    "animals, 2-1": (
        ON_PHOTOGRAPHS,
        *(f"photographs_animals{end}" for end in ("_dkd", "", "_cpu", "_others", "_warmup")),
    ),
    "photographs, 5-3": (ON_PHOTOGRAPHS, "photographs_cpu", "photographs"),
    "photographs, 15-1": (ON_PHOTOGRAPHS, "photographs_15-1", "photographs_15-1_others"),
    "painted, 5-3": (ON_PAINTED, "painted"),
    "painted, 15-1": (ON_PAINTED, "painted_15-1"),
    "painted, 5-3 disjoint": (ON_PAINTED, "painted_disjoint"),
}
WITH_GOALS = ("animals, 2-1", "photographs, 5-3", "painted, 5-3")  # with three seeds

# A method, the one that it is compared with, and the points that it is to be ahead, the last of them on
# the painted set.
GOALS = (
    ("EIR", "image replay", (2, 2, 3)),
    ("best EIR", "image replay", (5, 5, 10)),
    ("best EIR", "DKD-M", (4, 4, 8)),
    ("best EIR", "pseudo labels + distillation", (8, 8, 20)),
    ("best EIR", "DKD", (8, 8, 20)),
)


def read(best: str, *folders: str) -> Comparison:
    """The runs of a set that have all their steps, by METHODS; the seeds of each in their order."""
    found = [read_comparisons(ROOT / "docs/results" / name / "results.csv") for name in folders]
    found = [comparison for (comparison,) in found]
    runs = {}
    for method in METHODS:
        seeds = {}
        for comparison in found:
            for steps in comparison.runs.get(best if method == "best EIR" else method, []):
                seeds.setdefault(steps[0]["seed"], steps)
        if seeds:
            runs[method] = [seeds[seed] for seed in sorted(seeds)]
    return Comparison(found[0].task, runs, [], None, "", [])


def last(comparison: Comparison, method: str) -> dict[int, float]:
    """The mean IoU of all classes after the last step, in percent, by seed."""
    return {steps[-1]["seed"]: steps[-1]["all"] for steps in comparison.runs.get(method, [])}


def methods_table(sets: dict[str, Comparison]) -> str:
    """Methods x sets, mean ± sample standard deviation over seeds."""
    rows = [["method", *sets]]
    for method in METHODS:
        values = [[*last(comparison, method).values()] for comparison in sets.values()]
        rows.append([method, *(mean_and_deviation(np.array(numbers)) for numbers in values)])
    return markdown(rows)


def goal(comparison: Comparison, method: str, other: str, points: float) -> str:
    """Whether a method's mean is so many points ahead; for "EIR", whether it is ahead in each seed too.

    The differences are those of the seeds that both have.
    """
    ours, theirs = last(comparison, method), last(comparison, other)
    means = [np.mean([*values.values()]) for values in (ours, theirs)]
    by_seed = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    reached = means[0] - means[1] >= points and (method != "EIR" or min(by_seed) > 0)
    text = ", ".join(f"{difference:+.1f}" for difference in by_seed)
    return f"{_word(reached)}: {means[0]:.1f} against {means[1]:.1f}; {text}"


def share(comparison: Comparison) -> str:
    """The part of the gap from fine-tuning to joint training that the best EIR closes."""
    floor, best, top = (last(comparison, m) for m in ("fine-tuning", "best EIR", "joint"))
    low, middle, high = (np.mean([*values.values()]) for values in (floor, best, top))
    part = (middle - low) / (high - low)
    seeds = [seed for seed in best if seed in floor and seed in top]
    by_seed = ((best[s] - floor[s]) / (top[s] - floor[s]) for s in seeds)
    text = ", ".join(f"{100 * value:.0f}" for value in by_seed)
    return f"{_word(part >= 0.8)}: {100 * part:.0f} %; {text}"


def _word(reached):
    return "reached" if reached else "**missed**"


def goals_table(sets: dict[str, Comparison]) -> str:
    """Goals x sets: the two means, and the difference in each seed."""
    rows = [["goal", *WITH_GOALS]]
    chosen = [sets[name] for name in WITH_GOALS]
    for method, other, points in GOALS:
        title = f"{method} above {other} by {points[0]}, painted by {points[-1]}"
        if method == "EIR":
            title = f"{title}, and above it in each seed"
        cells = (goal(c, method, other, p) for c, p in zip(chosen, points, strict=True))
        rows.append([title, *cells])
    rows.append(
        ["best EIR closes four fifths of the gap from fine-tuning to joint", *map(share, chosen)]
    )
    return markdown(rows)


def figure(sets: dict[str, Comparison]) -> Figure:
    """The mean IoU over the steps on the sets with three seeds."""
    drawn = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, name in zip(drawn.subplots(1, len(WITH_GOALS)), WITH_GOALS, strict=True):
        draw_mean_iou(axes, sets[name], METHODS)
        axes.set_title(name)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, handlelength=3.5)
    return drawn


def main() -> None:
    Parser(None, __doc__).parse_args()
    sets = {name: read(*runs) for name, runs in SETS.items()}
    print(f"{goals_table(sets)}\n{methods_table(sets)}", end="")
    save(figure(sets), ROOT / "docs/figures/headline.png")


if __name__ == "__main__":
    main()
