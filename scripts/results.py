"""One table of all finished runs, with the seeds of a setting averaged, and a picture of results by shots.

    python scripts/results.py
    python scripts/results.py runs/tfa runs/meta_rcnn --metric AP75 --plot shots.png
    python scripts/results.py --markdown

Settings are read from the results. Runs belong to one setting if they differ only in --seed (and in what has no part in
the result, as --workers); a copy of a run counts once, and a --test-only of it in another way is a line of its own. A ±
after the mean over several seeds is the 95 % interval of that mean by Student's t, which with two or three seeds is
wide, and rightly so. After a single classifier's accuracy it is the interval over the test tasks.
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from fewshot import InputError

GROUPS = ("base", "novel", "all")
# 97.5 % quantiles of Student's t for 1, 2, 3, ... degrees of freedom; for more than these the normal one is close
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
NORMAL = 1.96
TEST = re.compile(r"test-[0-9a-f]{8}\.json")  # what --test-only leaves


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # where to look, at any depth
    metric: str = "AP50"  # of detectors; COCO has AP, AP50, AP75, APs, ..., the others AP50, AP75, AP, AP50s, ...
    markdown: bool = False  # print a table that Markdown shows
    json: Path | None = None  # also write the rows to this file
    plot: Path | None = None  # also draw novel classes' results, or accuracies, against the number of shots


@dataclass
class Run:
    """A finished run: `values` by column, each (percent, half its interval or None)."""

    method: str
    args: dict[str, Any]  # those that have a part in the result, without the seed
    seed: int
    data: str
    what: str  # base training, 10 shots, 5-way tasks
    values: dict[str, tuple[float, float | None]]
    id: str  # the same in every copy of a run, and in a test that repeats its own

    @property
    def setting(self) -> tuple[str, str, str, str]:
        return self.method, self.data, self.what, json.dumps(self.args, sort_keys=True)


def read(path: Path, metric: str) -> Run | None:
    """The run or test whose result is in this file, by what the result says of itself; None without such a metric."""
    try:
        metrics = json.loads(path.read_text())
        settings = metrics["settings"]
        trained, tested = settings["trained"], settings["tested"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a result with its settings ({error!r}); test its run again, or leave it out"
        ) from None
    kept = {**trained, **tested}
    method, seed = settings["method"], settings["seed"]
    id = str((str(settings["id"]).partition("-")[0], json.dumps(tested, sort_keys=True)))
    if "shots" in metrics:
        kept.pop("shots", None)
        values = {f"{k}-shot": (v["accuracy"], v["ci95"]) for k, v in metrics["shots"].items()}
        return Run(method, kept, seed, trained["dataset"], f"{metrics['ways']}-way tasks", values, id)
    if not metrics.get(metric):
        return None
    protocol, shots = metrics["protocol"], kept.pop("shots")
    kept |= {"proposals": protocol["proposals"]} if "proposals" in protocol else {}
    data = Path(trained["dataset"]).stem + (f", split {protocol['split']}" if protocol["split"] else "")
    novel = ", novel classes" if protocol["trained_on"] == "novel classes" else ""
    what = "base training" if protocol["stage"] == "base" else f"{shots} shots{novel}"
    return Run(method, kept, seed, data, what, {group: (v, None) for group, v in metrics[metric].items()}, id)


def averaged(runs: list[Run]) -> dict[str, tuple[float, float | None]]:
    """Mean and half its 95 % interval, column by column, over the seeds of a setting."""
    if len(runs) == 1:
        return runs[0].values
    table = {}
    for column in runs[0].values:
        numbers = [run.values[column][0] for run in runs if column in run.values]
        n = len(numbers)
        if n == 1:
            table[column] = (numbers[0], None)
            continue
        t = STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL
        table[column] = (statistics.mean(numbers), t * statistics.stdev(numbers) / n**0.5)
    return table


def rows(runs: list[Run]) -> Iterator[tuple[Run, int, str, dict[str, tuple[float, float | None]]]]:
    """(a run of the setting, number of seeds, what sets it apart from similar settings, averages), sorted."""
    settings: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        settings[run.setting].append(run)
    similar: dict[tuple, list[dict]] = defaultdict(list)
    for (*where, _), same in settings.items():
        similar[tuple(where)].append(same[0].args)
    for (*where, _), same in sorted(settings.items(), key=lambda item: _order(item[1][0])):
        others, mine = similar[tuple(where)], same[0].args
        names = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
        apart = ", ".join(f"{name} {mine[name]}" for name in names if mine[name] is not None)
        yield same[0], len({run.seed for run in same}), apart, averaged(same)


def _order(run: Run) -> tuple:
    first = run.what.split()[0]
    return run.method, run.data, int(first) if first.isdigit() else 0, run.what, json.dumps(run.args, sort_keys=True)


def table(lines: list[list[str]], markdown: bool) -> str:
    """Lines of cells as text; the first is the head."""
    if markdown:
        lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def draw(found: list[tuple[Run, int, str, dict]], path: Path, metric: str) -> None:
    """Results against shots, a line per method, data and setting, with intervals; `path` gives the format."""
    lines: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for run, _, apart, values in found:
        name = ", ".join(filter(None, (run.method, run.data, apart)))
        if run.what.endswith("tasks"):
            points = [(int(column.split("-")[0]), *value) for column, value in values.items()]
        else:
            points = [(int(run.what.split()[0]), *values["novel"])] if "novel" in values else []
        lines[name] += [(shots, value, ci or 0.0) for shots, value, ci in points]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        if points:
            shots, value, ci = zip(*sorted(points))
            axis.errorbar(shots, value, ci, label=name, marker="o", markersize=4, capsize=3, linewidth=1)
    axis.set_xlabel("shots")
    axis.set_ylabel(f"{metric} of novel classes, or accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    runs = []
    for folder in args.folders:
        places = sorted(p for p in folder.rglob("*.json") if p.name == "metrics.json" or TEST.fullmatch(p.name))
        if not places:
            raise InputError(f"{folder}: no finished run in there; give a folder that a recipe wrote, such as runs")
        runs += [run for place in places if (run := read(place, args.metric))]
    runs = list({run.id: run for run in runs}.values())
    if not runs:
        raise InputError(f"none of these runs has {args.metric}: give another --metric")
    found = list(rows(runs))
    columns = list(dict.fromkeys([*GROUPS, *(column for *_, values in found for column in values)]))
    columns = [column for column in columns if any(column in values for *_, values in found)]
    lines = [["method", "data", "what", "seeds", *columns, "differing in"]]
    for run, seeds, apart, values in found:
        cells = (values.get(column) for column in columns)
        numbers = ["-" if c is None else f"{c[0]:.1f}" + (f" ± {c[1]:.1f}" if c[1] is not None else "") for c in cells]
        lines.append([run.method, run.data, run.what, str(seeds), *numbers, apart])
    print(table(lines, args.markdown))
    if args.json:
        content = [
            {"method": r.method, "data": r.data, "what": r.what, "seeds": n, "args": r.args, "values": values}
            for r, n, _, values in found
        ]
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        draw(found, args.plot, args.metric)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
