"""Tables of all finished runs, with the seeds of a setting averaged; two settings compared; results
drawn over shots.

    python scripts/results.py
    python scripts/results.py runs/tfa runs/meta_rcnn --metric AP75 --plot shots.png
    python scripts/results.py runs --cd-fsod
    python scripts/results.py --compare runs/tfa/glyphs-split1-small runs/fsce/glyphs-split1-small
    python scripts/results.py --compare runs/proto_net/cub-conv4-seed0 runs/maml/cub-conv4-seed0

The tables are Markdown: one of settings, then one of the single runs and how each came about, as
their results tell. Runs are averaged only if they differ in nothing but --seed (and in what has no
part in the result, as --workers); else each has its own row, and a line says in what they differ. A
copy of a run counts once; a --test-only of it in another way is a row of its own.

--cd-fsod makes the benchmark's table, mAP of its six data sets, of the runs that kept to its
protocol: its shots, all of its test pictures. The runs of a method and shots share a row, unless a
data set has them in several settings.

--compare takes two folders or result files, and their difference on what both were tested on: one
classifier each, run with --save-tasks, task by task; otherwise seed by seed, which for detectors
means the same shots.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from fewshot import InputError
from fewshot.data import annotations, cd_fsod
from fewshot.training.folders import mean_interval

GROUPS = ("base", "novel", "all")
TEST = re.compile(r"test-[0-9a-f]{8}\.json")  # what --test-only leaves
# What two runs must have in common for the difference of their results to be one of methods or
# settings.
ALIKE = (
    "dataset",
    "data_root",
    "novel_classes",
    "novel",
    "split",
    "shot_lists",
    "stage",
    "trained_on",
)
ALIKE += ("test_pictures", "test_objects", "ways", "queries", "tasks")
# What no data set has in common with another
OF_DATA = ("dataset", "data_root", "test_pictures", "test_objects", "test_proposals")


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # folders, or files
    metric: str | None = None  # detectors': AP, AP75, APs, ...; by default AP50, with --cd-fsod AP
    cd_fsod: bool = False  # CD-FSOD's table: a row per method and shots, a column per data set
    compare: bool = False  # the difference of two folders or result files, with its interval
    details: bool = True  # also the table of single runs
    json: Path | None = None  # also write all rows to this file
    plot: Path | None = None  # also draw results, or accuracies, against the number of shots


@dataclass
class Run:
    """A finished run: `values` by column, each (percent, half its 95 % interval or None)."""

    path: Path
    where: dict[str, str]  # its row's first columns; runs that agree in these may differ in `args`
    args: dict[str, Any]  # all else that has a part in the result, but the seed
    seed: int
    values: dict[str, tuple[float, float | None]]
    test: str  # how much it was tested on
    id: str  # the same in every copy of a run, and in a test that repeats its own
    about: dict[str, Any]  # how the result came about
    tasks: dict[str, list[float]] | None  # accuracies of single tasks, by shots

    @property
    def classifies(self) -> bool:
        return "ways" in self.where

    @property
    def setting(self) -> str:
        return json.dumps([self.where, self.args], sort_keys=True)

    @property
    def family(self) -> str:
        """The same in all runs of a method and data, whatever the shots; base training is one of
        its own.
        """
        shots = self.where.get("shots") == "base"
        return json.dumps({**self.where, "shots": shots}, sort_keys=True)

    @property
    def digits(self) -> int:
        return 2 if self.classifies else 1


@dataclass
class Row:
    """Runs that differ in their seed alone."""

    runs: list[Run]
    apart: dict[str, Any]  # what tells it from rows of the same method and data

    @property
    def values(self) -> dict[str, tuple[float, float | None]]:
        if len(self.runs) == 1:
            return self.runs[0].values
        columns = [c for c in self.runs[0].values if all(c in run.values for run in self.runs)]
        return {c: mean_interval([run.values[c][0] for run in self.runs]) for c in columns}

    @property
    def over(self) -> str:
        """What its intervals are over."""
        return "seeds" if len(self.runs) > 1 else "tasks" if self.runs[0].classifies else "-"


def read(path: Path, metric: str) -> Run | None:
    """The run or test whose result is in this file, by what the result says of itself; None without
    such a metric.
    """
    try:
        run = _run(path, annotations.read_json(path), metric)
        if run is not None and (flaw := _flaw(run)):
            raise ValueError(flaw)
        return run
    except InputError:
        raise
    # of a file that is not what a run wrote
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a result with its settings ({error!r:.200}); test its run again, or leave it out"
        ) from None


def _run(path: Path, metrics: dict[str, Any], metric: str) -> Run | None:
    settings = metrics["settings"]
    trained, tested = settings["trained"], settings["tested"]
    about, args, identity = (
        settings.get("run", {}),
        {**trained, **tested},
        str(settings["id"]).partition("-")[0],
    )
    if "base" in about:  # a file may move, or be made anew: what is in it counts
        args["base"] = about["base"] and about["base"][:8]
    if "precision" in about:
        args["precision"] = about["precision"]
    identity = (
        str(path) if identity == "None" else str((identity, json.dumps(tested, sort_keys=True)))
    )
    # the second one where it tests
    places = filter(None, (trained["dataset"], args.pop("test_dataset", None)))
    where = {
        "method": settings["method"],
        "data": " to ".join(Path(place).name or place for place in places),
    }
    tasks = None
    if "shots" in metrics:
        where |= {"ways": str(metrics["ways"])}
        args |= {"tasks": metrics["tasks"]}
        values = {f"{k}-shot": (v["accuracy"], v["ci95"]) for k, v in metrics["shots"].items()}
        test = f"{metrics['tasks']} tasks"
        file = path.with_name(
            "tasks.json" if path.name == "metrics.json" else f"{path.stem}-tasks.json"
        )
        tasks = _tasks(file, path, metrics["shots"]) if file.exists() else None
    elif metrics.get(metric):
        protocol, shots = metrics["protocol"], args.pop("shots")
        shots = "base" if protocol["stage"] == "base" else str(shots)
        where |= {"split": str(protocol["split"] or "-"), "shots": shots}
        # tells the seed
        args |= {
            name: value for name, value in protocol.items() if name not in ("dataset", "shots")
        }
        values = {group: (value, None) for group, value in metrics[metric].items()}
        test = f"{protocol['test_pictures']} pictures" if "test_pictures" in protocol else "-"
        test += f", {protocol['test_objects']} objects" if "test_objects" in protocol else ""
    else:
        return None
    return Run(path, where, args, settings["seed"], values, test, identity, about, tasks)


def _tasks(file: Path, result: Path, shots: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """Accuracies of single tasks, by the shots of the result that the file is of."""
    tasks = annotations.read_json(file)
    if not isinstance(tasks, dict) or not all(
        isinstance(values, list) and values and all(map(_is_number, values))
        for values in tasks.values()
    ):
        raise InputError(
            f"{file}: not the accuracies of tasks by shots; test its run again, or remove it"
        )
    if len({len(values) for values in tasks.values()}) > 1 or (
        tasks and tasks.keys() != shots.keys()
    ):
        raise InputError(
            f"{file}: not as many tasks of all shots of {result.name}; test its run again, or remove it"
        )
    return tasks or None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not


def _flaw(run: Run) -> str | None:
    """What a table cannot be made of in a run, if anything."""
    shots = run.where.get("shots", "all")
    if (
        not all(isinstance(value, str) and value for value in run.where.values())
        or type(run.seed) is not int
    ):
        return f"method {run.where['method']!r}, seed {run.seed!r}"
    if not run.where.get("ways", "5").isdecimal() or not (
        shots in ("base", "all") or shots.isdecimal()
    ):
        return f"ways {run.where.get('ways')}, shots {shots}"
    for column, (value, half) in run.values.items():
        known = column.removesuffix("-shot").isdecimal() if run.classifies else column in GROUPS
        if not (known and _is_number(value) and (half is None or (_is_number(half) and half >= 0))):
            return f"{column} {value!r} ± {half!r}"
    if not run.values:
        return "no numbers"
    if not _is_number(run.about.get("seconds", 0)):
        return f"seconds {run.about['seconds']!r}"
    texts = [run.about.get(name) or "" for name in ("base", "commit")]
    return None if all(isinstance(text, str) for text in texts) else f"base and commit {texts}"


def collect(folders: Iterable[Path], metric: str) -> list[Run]:
    """Every run below these folders, or in these files, once."""
    runs: dict[str, Run] = {}
    for folder in folders:
        found = [
            p for p in folder.rglob("*.json") if p.name == "metrics.json" or TEST.fullmatch(p.name)
        ]
        places = [folder] if folder.is_file() else sorted(found)
        if not places:
            raise InputError(
                f"{folder}: no finished run in there; give a folder that a recipe wrote, such as runs"
            )
        for run in filter(None, (read(place, metric) for place in places)):
            kept = runs.setdefault(run.id, run)
            kept.tasks = kept.tasks or run.tasks
    if not runs:
        raise InputError(f"none of these runs has {metric}: give another --metric")
    return list(runs.values())


def differing(many: Sequence[dict[str, Any]]) -> list[str]:
    """Names whose values are not the same in all."""
    names = dict.fromkeys(name for one in many for name in one)
    return [name for name in names if any(one.get(name) != many[0].get(name) for one in many)]


def told(names: Iterable[str], many: Sequence[dict[str, Any]]) -> str:
    """These names, each with all its values."""
    values = {name: list(dict.fromkeys(_short(one.get(name)) for one in many)) for name in names}
    return ", ".join(f"{name} ({' / '.join(value)})" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)


def rows(runs: list[Run]) -> list[Row]:
    """Runs by setting, sorted. A seed that was run twice makes a second row: it does not count
    double.
    """
    settings, times = defaultdict(list), Counter()
    for run in sorted(runs, key=lambda run: (run.seed, run.path)):
        times[once := (run.setting, run.seed)] += 1
        if times[once] > 1:
            run.args["repetition"] = times[once]
        settings[run.setting].append(run)
    families: dict[str, list[list[Run]]] = defaultdict(list)
    for same in settings.values():
        families[same[0].family].append(same)
    found = []
    for family in families.values():
        names = differing([same[0].args for same in family])
        found += [
            Row(same, {n: v for n in names if (v := same[0].args.get(n)) is not None})
            for same in family
        ]
    return sorted(found, key=_order)


def _order(row: Row) -> tuple:
    where = row.runs[0].where
    names = where["method"], where["data"], where.get("split", "")
    return row.runs[0].classifies, *names, _number(where), -len(row.runs), str(row.apart)


def _number(where: dict[str, str]) -> int:
    """Ways or shots, to sort by."""
    shots = where.get("shots", "")
    return int(where.get("ways") or {"base": 0, "all": 10**6}.get(shots, shots))


def not_averaged(found: list[Row]) -> list[str]:
    """A line for each method, data and shots that has several rows: why."""
    places: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        places[_place(row.runs[0].where)].append(row.runs[0].args)
    return [
        f"Not averaged: {place} has {len(many)} rows, which differ in {told(differing(many), many)}."
        for place, many in places.items()
        if len(many) > 1
    ]


def _place(where: dict[str, str]) -> str:
    named = [
        f"{name} {value}" if name in ("split", "shots", "ways") else value
        for name, value in where.items()
    ]
    return ", ".join(text for text in named if text != "split -")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first being the head, as Markdown that can be read as it is, without
    empty columns.
    """
    columns = [column for column in zip(*lines) if set(column[1:]) - {"", "-"}]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in zip(*columns)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |"
        for line in lines
    )


def number(value: tuple[float, float | None] | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.{digits}f}" + ("" if value[1] is None else f" ± {value[1]:.{digits}f}")


def main_table(found: list[Row], metric: str) -> str:
    """Settings with their means, a row each, of detectors or of classifiers."""
    first = found[0].runs[0]
    columns = list(dict.fromkeys(column for row in found for column in row.values))
    columns.sort(key=lambda c: GROUPS.index(c) if c in GROUPS else int(c.split("-")[0]))
    names = [f"{metric} {column}" if column in GROUPS else column for column in columns]
    lines = [[*first.where, "seeds", *names, "± over", "tested on", "differing in"]]
    for row in found:
        seeds = f"{len(row.runs)}: {', '.join(str(run.seed) for run in row.runs)}"
        numbers = [number(row.values.get(column), first.digits) for column in columns]
        apart = ", ".join(f"{name} {_short(value)}" for name, value in row.apart.items())
        lines.append(
            [*row.runs[0].where.values(), seeds, *numbers, row.over, row.runs[0].test, apart]
        )
    return markdown(lines)


def on_benchmark(found: list[Row]) -> list[Row]:
    """Those that kept to CD-FSOD's protocol, as their results tell."""
    kept = [row for row in found if row.runs[0].args.get("benchmark") == cd_fsod.NAME]
    if not kept:
        raise InputError(
            f"--cd-fsod: none of these runs kept to {cd_fsod.NAME}'s protocol: --dataset {', '.join(cd_fsod.FOLDERS)} "
            "in the published layout, without --shot-lists and --test-images"
        )
    return kept


def cd_fsod_table(found: list[Row], metric: str) -> str:
    """The benchmark's form: a row per method and shots, a column per data set, their mean where all
    six are there.

    Where a data set has several settings of a method and shots, each has a row, across the data
    sets.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in sorted(
        found, key=lambda row: (_number(row.runs[0].where), row.runs[0].where["method"])
    ):
        groups[row.runs[0].where["method"], row.runs[0].where["shots"]].append(row)
    lines = [
        [
            "method",
            "shots",
            *(folders[0] for folders in cd_fsod.FOLDERS.values()),
            "mean",
            "differing in",
        ]
    ]
    spread = []
    for (method, shots), group in groups.items():
        by_data: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in group:
            by_data[row.runs[0].where["data"]].append(row.runs[0].args)
        names = list(dict.fromkeys(name for many in by_data.values() for name in differing(many)))
        settings: dict[str, list[Row]] = defaultdict(list)
        for row in group:
            setting = ", ".join(f"{name} {_short(row.runs[0].args.get(name))}" for name in names)
            settings[setting].append(row)
        for setting, same in settings.items():
            values = {row.runs[0].where["data"]: row.values["all"] for row in same}
            mean = sum(value for value, _ in values.values()) / len(values), None
            cells = [number(values.get(name), 1) for name in cd_fsod.FOLDERS]
            cells += [number(mean if len(values) == len(cd_fsod.FOLDERS) else None, 1), setting]
            lines.append([method, shots, *cells])
            many = [row.runs[0].args for row in same]
            if others := [name for name in differing(many) if name not in OF_DATA]:
                spread.append(
                    f"Settings of {method}, shots {shots}, differ between data sets: {told(others, many)}."
                )
    return "\n".join([markdown(lines), "", f"{cd_fsod.NAME}, {metric} of all classes.", *spread])


def details(found: list[Row]) -> str:
    """Single runs: their results, and how these came about."""
    head = "run seed result base commit hardware processes precision time memory command"
    lines = [head.split()]
    for run in (run for row in found for run in row.runs):
        about = {name: "-" if value is None else str(value) for name, value in run.about.items()}
        result = ", ".join(
            f"{column} {number(value, run.digits)}" for column, value in run.values.items()
        )
        place = run.path.parent if run.path.name == "metrics.json" else run.path
        time = str(timedelta(seconds=round(run.about["seconds"]))) if "seconds" in about else "-"
        memory = f"{about['peak_memory_gb']} GB" if "peak_memory_gb" in about else "-"
        command = f"`{about['command']}`" if "command" in about else "-"
        commit = about.get("commit", "-")
        cells = [
            about.get("base", "-")[:8],
            commit[:10] + "+" * (len(commit) > 10 and commit.endswith("+")),
        ]
        cells += [about.get(name, "-") for name in ("hardware", "processes", "precision")]
        lines.append([str(place), str(run.seed), result, *cells, time, memory, command])
    return markdown(lines)


def legend(found: list[Row]) -> str:
    """What ± stands for in these rows."""
    over = {row.over for row in found}
    kinds = {"seeds": "over seeds by Student's t", "tasks": "over the test tasks of the one run"}
    said = " or ".join(text for name, text in kinds.items() if name in over)
    return (
        f"All in percent. ± is half the 95 % interval of the mean, {said}."
        if said
        else "All in percent."
    )


def draw(found: list[Row], metric: str) -> Figure:
    """Results against shots, a line per method, data and setting, with intervals; "all" stands at
    the end.
    """
    detectors = [
        r for r in found if not r.runs[0].classifies and r.runs[0].where["shots"] != "base"
    ]
    panels = [
        (f"{metric} of novel classes, %", _lines(r for r in detectors if "novel" in r.values)),
        ("accuracy, %", _lines(r for r in found if r.runs[0].classifies)),
    ]
    panels = [(label, lines) for label, lines in panels if lines]
    if not panels:
        raise InputError("--plot: none of these runs has novel classes or shots")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axis, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        numbers = sorted(
            {int(shots) for points in lines.values() for shots in points if shots != "all"}
        )
        at = {str(n): n for n in numbers} | {"all": 2 * numbers[-1] if numbers else 1}
        shown = [shots for shots in at if any(shots in points for points in lines.values())]
        for name, points in lines.items():
            shots = sorted(points, key=at.get)
            value, half = zip(*(points[k] for k in shots))
            half = [h or 0 for h in half]
            style = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1}
            axis.errorbar([at[k] for k in shots], value, half, label=name, **style)
        axis.set_xscale("log")
        axis.set_xticks([at[k] for k in shown], shown)
        axis.minorticks_off()
        axis.set_xlabel("shots")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _lines(found: Iterable[Row]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Points (value, half interval) by name of the line and shots."""
    lines: dict[str, dict[str, tuple[float, float | None]]] = defaultdict(dict)
    for row in found:
        where = {name: value for name, value in row.runs[0].where.items() if name != "shots"}
        name = ", ".join(
            [_place(where), *(f"{name} {_short(value)}" for name, value in row.apart.items())]
        )
        if "ways" in where:
            lines[name] |= {column.split("-")[0]: value for column, value in row.values.items()}
        else:
            lines[name][row.runs[0].where["shots"]] = row.values["novel"]
    return lines


def compare(a: Path, b: Path, metric: str) -> list[dict[str, Any]]:
    """Differences A - B of all that both have, paired by task or by seed; base training only if
    nothing else.

    Raises:
        InputError: they have nothing in common, several settings, other tasks or seeds, or were not
            tested alike.
    """
    sides: list[dict[str, list[Run]]] = []
    for folder in (a, b):
        sides.append(defaultdict(list))
        for run in sorted(
            collect([folder], metric), key=lambda run: (_number(run.where), run.seed)
        ):
            sides[-1][
                _place({name: value for name, value in run.where.items() if name != "method"})
            ].append(run)
    common = [place for place in sides[0] if place in sides[1]]
    few = [place for place in common if sides[0][place][0].where.get("shots") != "base"]
    differences = []
    for place in few or common:
        left, right = sides[0][place], sides[1][place]
        over, pairs = _paired(place, (a, left), (b, right))
        for column, values in pairs.items():
            mean, half = mean_interval([x - y for x, y in zip(*values, strict=True)])
            row = {"setting": place, "result": f"{metric} {column}" if column in GROUPS else column}
            row |= {
                "a": mean_interval(values[0])[0],
                "b": mean_interval(values[1])[0],
                "difference": mean,
            }
            differences.append({**row, "half": half, "pairs": len(values[0]), "over": over})
    if not differences:
        has = [
            [f"{place}: {', '.join(runs[0].values)}" for place, runs in side.items()]
            for side in sides
        ]
        raise InputError(
            f"nothing to compare: {a} has {'; '.join(has[0])}, and {b} has {'; '.join(has[1])}"
        )
    for folder, mine in ((a, sides[0]), (b, sides[1])):
        if alone := [place for place in mine if place not in common]:
            print(f"Only in {folder}, not compared: {'; '.join(alone)}.\n")
    return differences


def _paired(
    place: str, a: tuple[Path, list[Run]], b: tuple[Path, list[Run]]
) -> tuple[str, dict[str, tuple[list[float], list[float]]]]:
    """(what pairs are over, their values in A and in B by column)."""
    for folder, side in (a, b):
        many = [run.args | {"method": run.where["method"]} for run in side]
        if names := differing(many):
            raise InputError(
                f"{folder}: its runs of {place} differ in {told(names, many)}; name a folder or result file of one"
            )
        if len({run.seed for run in side}) < len(side):
            raise InputError(
                f"{folder}: a seed was run twice for {place}; name a folder with one run of each"
            )
    (a, left), (b, right) = a, b
    alike = [
        {name: side[0].args[name] for name in ALIKE if name in side[0].args}
        for side in (left, right)
    ]
    if names := differing(alike):
        raise InputError(f"{a} and {b} were not tested alike for {place}: {told(names, alike)}")
    if left[0].classifies and len(left) == len(right) == 1:
        for folder, (run,) in ((a, left), (b, right)):
            if run.tasks is None:
                raise InputError(
                    f"{folder} has no tasks.json with every task's accuracy: --test-only --save-tasks"
                )
        x, y = left[0].tasks, right[0].tasks
        return "tasks", {f"{k}-shot": (x[k], y[k]) for k in x if k in y}
    seeds = [", ".join(str(run.seed) for run in side) for side in (left, right)]
    if seeds[0] != seeds[1]:
        raise InputError(
            f"{a} has seeds {seeds[0]} and {b} {seeds[1]} for {place}: give the same seeds of both"
        )
    columns = [column for column in left[0].values if column in right[0].values]
    x, y = ({c: [run.values[c][0] for run in side] for c in columns} for side in (left, right))
    return "seeds", {c: (x[c], y[c]) for c in columns}


def comparison(a: Path, b: Path, differences: list[dict[str, Any]]) -> str:
    """Differences as a table."""
    lines = [["setting", "result", "A", "B", "A - B", "95 % interval", "includes 0", "pairs"]]
    for row in differences:
        mean, half, interval, zero = row["difference"], row["half"], "-", "-"
        if half is not None:
            interval = f"{mean - half:.2f} to {mean + half:.2f}"
            zero = "yes" if abs(mean) <= half else "no"
        pairs = f"{row['pairs']} {row['over']}" if row["pairs"] > 1 else "1 seed: no interval"
        numbers = [f"{row['a']:.2f}", f"{row['b']:.2f}", f"{mean:+.2f}"]
        lines.append([row["setting"], row["result"], *numbers, interval, zero, pairs])
    return f"A: {a}\nB: {b}\n\n{markdown(lines)}\n\nAll in percent; intervals by Student's t over the pairs."


def main(args: Args) -> None:
    metric = args.metric or ("AP" if args.cd_fsod else "AP50")
    if args.compare:
        if len(args.folders) != 2:
            raise InputError("--compare needs two folders or result files: --compare A B")
        if args.plot:
            raise InputError(
                "--plot draws runs over shots, not a difference: leave one of the two out"
            )
        if args.cd_fsod:
            raise InputError(
                "--cd-fsod is a table of runs, not a difference: leave one of the two out"
            )
        content = compare(*args.folders, metric)
        print(comparison(*args.folders, content))
    else:
        found = rows(collect(args.folders, metric))
        found = on_benchmark(found) if args.cd_fsod else found
        kinds = [
            [r for r in found if r.runs[0].classifies == classifiers]
            for classifiers in (False, True)
        ]
        parts = [
            (cd_fsod_table if args.cd_fsod else main_table)(kind, metric) for kind in kinds if kind
        ]
        parts += ["\n".join([legend(found), *not_averaged(found)])]
        print("\n\n".join(parts + ([details(found)] if args.details else [])))
        content = [_content(row) for row in found]
        if args.plot:
            try:
                draw(found, metric).savefig(args.plot, dpi=150)
            except ValueError as error:  # matplotlib's, of a suffix that it does not know
                raise InputError(f"--plot {args.plot}: {error}") from None
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def _content(row: Row) -> dict[str, Any]:
    runs = [
        {
            "path": str(run.path),
            "seed": run.seed,
            "values": {c: v for c, (v, _) in run.values.items()},
            **run.about,
        }
        for run in row.runs
    ]
    first = row.runs[0]
    return {
        **first.where,
        "args": first.args,
        "values": row.values,
        "over": row.over,
        "test": first.test,
        "runs": runs,
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
