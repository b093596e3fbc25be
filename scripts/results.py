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
RESULT = re.compile(
    r"metrics\.json|test-[0-9a-f]{8}\.json"
)  # the second is what --test-only leaves

# What two runs must have in common for the difference of their results to be one of methods or
# settings.
ALIKE = """dataset data_root novel_classes novel split shot_lists stage trained_on
test_pictures test_objects ways queries tasks""".split()

# What no data set has in common with another
OF_DATA = ("dataset", "data_root", "test_pictures", "test_objects", "test_proposals")

Value = tuple[float, float | None]  # percent, and half its 95 % interval if it has one


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
    """A finished run, or a test of one."""

    path: Path
    where: dict[str, str]  # its row's first columns; runs that agree in these may differ in `args`
    args: dict[str, Any]  # all else that has a part in the result, but the seed
    seed: int
    values: dict[str, Value]  # by column
    test: str  # how much it was tested on
    id: str  # the same in every copy of a run, and in a test that repeats its own
    about: dict[str, Any]  # how the result came about
    tasks: dict[str, list[float]] | None  # accuracies of single tasks, by shots

    @property
    def classifies(self) -> bool:
        return "ways" in self.where

    @property
    def base(self) -> bool:
        """Is it base training, before any shots?"""
        return self.where.get("shots") == "base"

    @property
    def order(self) -> int:
        """Its ways or shots, to sort by."""
        shots = self.where.get("shots", "")
        return int(self.where.get("ways") or {"base": 0, "all": 10**6}.get(shots, shots))


@dataclass
class Row:
    """Runs that differ in their seed alone."""

    runs: list[Run]
    apart: dict[str, Any]  # what tells it from rows of the same method and data

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def where(self) -> dict[str, str]:
        return self.first.where

    @property
    def values(self) -> dict[str, Value]:
        if len(self.runs) == 1:
            return self.first.values
        return {c: mean_interval(many) for c, many in by_column(self.runs).items()}

    @property
    def over(self) -> str:
        """What its intervals are over."""
        if len(self.runs) > 1:
            return "seeds"
        return "tasks" if self.first.classifies else "-"


def by_column(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The runs' numbers in every column that all of them have."""
    columns = [c for c in runs[0].values if all(c in run.values for run in runs)]
    return {c: [run.values[c][0] for run in runs] for c in columns}


def read(path: Path, metric: str) -> Run | None:
    """The run or test whose result is in this file, by what the result says of itself; None without
    such a metric.
    """
    try:
        return _run(path, annotations.read_json(path), metric)
    except InputError:
        raise
    # of a file that is not what a run wrote
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{path}: not a result with its settings ({error!r:.200}); test its run again, or leave it out"
        ) from None


def _run(path: Path, metrics: dict[str, Any], metric: str) -> Run | None:
    settings = metrics["settings"]
    trained, tested = settings["trained"], settings["tested"]
    about = settings.get("run", {})
    _number(about.get("seconds", 0))

    # a test has the id of its run, a dash, and more
    id = str(path)
    if settings["id"] is not None:
        id = str([str(settings["id"]).partition("-")[0], json.dumps(tested, sort_keys=True)])

    args = {**trained, **tested}
    args |= {name: about[name] for name in ("base", "precision") if name in about}
    if args.get("base"):  # a file may move, or be made anew: what is in it counts
        args["base"] = args["base"][:8]
    places = filter(None, (trained["dataset"], args.pop("test_dataset", None)))
    data = " to ".join(Path(place).name or place for place in places)
    where = {"method": str(settings["method"]), "data": data}

    if "shots" in metrics:
        shots, count = metrics["shots"], metrics["tasks"]
        where |= {"ways": str(int(metrics["ways"]))}
        args |= {"tasks": count}
        values = {f"{int(k)}-shot": _value(v["accuracy"], v["ci95"]) for k, v in shots.items()}
        test, tasks = f"{count} tasks", _tasks(path, shots)
    elif metrics.get(metric):
        protocol, shots = metrics["protocol"], args.pop("shots")
        if protocol["stage"] == "base":
            shots = "base"
        where |= {"split": str(protocol["split"] or "-")}
        where |= {"shots": shots if shots in ("base", "all") else str(int(shots))}
        # the protocol's shots tell the seed
        args |= {name: protocol[name] for name in protocol if name not in ("dataset", "shots")}
        numbers = metrics[metric]
        values = {group: _value(numbers[group]) for group in GROUPS if group in numbers}
        tested_on = [name for name in ("pictures", "objects") if f"test_{name}" in protocol]
        test = ", ".join(f"{protocol[f'test_{name}']} {name}" for name in tested_on) or "-"
        tasks = None
    else:
        return None
    if not values:
        raise ValueError("no numbers")
    return Run(path, where, args, int(settings["seed"]), values, test, id, about, tasks)


def _value(mean: Any, half: Any = None) -> Value:
    return _number(mean), None if half is None else abs(_number(half))


def _number(value: Any) -> float:
    """The value; raises ValueError if it is no number, or none that is in a result."""
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise ValueError(f"{value!r} is no number")
    return value


def _tasks(result: Path, shots: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """Accuracies of single tasks by the shots of a result, if they lie beside it."""
    name = "tasks.json" if result.name == "metrics.json" else f"{result.stem}-tasks.json"
    file = result.with_name(name)
    tasks = annotations.read_json(file) if file.exists() else {}
    if tasks == {}:
        return None
    try:
        lists = [[_number(one) for one in tasks[k]] for k in shots]
        if not all(lists) or len(set(map(len, lists))) > 1 or len(lists) < len(tasks):
            raise ValueError("not as many tasks of all shots")
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file}: not the accuracies of tasks by the shots of {result.name} ({error!r:.200}); "
            "test its run again, or remove it"
        ) from None
    return tasks


def collect(folders: Iterable[Path], metric: str) -> list[Run]:
    """Every run below these folders, or in these files, once."""
    runs: dict[str, Run] = {}
    for folder in folders:
        files = [folder]
        if not folder.is_file():
            files = sorted(file for file in folder.rglob("*.json") if RESULT.fullmatch(file.name))
        if not files:
            raise InputError(
                f"{folder}: no finished run in there; give a folder that a recipe wrote, such as runs"
            )
        for run in filter(None, (read(file, metric) for file in files)):
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


def named(values: Mapping[str, Any]) -> str:
    """Every name with its one value."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)


def rows(runs: list[Run]) -> list[Row]:
    """Runs by setting, sorted. A seed that was run twice makes a second row: it does not count
    double.
    """
    # by method and data whatever the shots, base training apart; in these by setting
    families: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    times = Counter()
    for run in sorted(runs, key=lambda run: (run.seed, run.path)):
        family = json.dumps({**run.where, "shots": run.base}, sort_keys=True)
        once = json.dumps([run.where, run.args, run.seed], sort_keys=True)
        times[once] += 1
        if times[once] > 1:
            run.args["repetition"] = times[once]
        setting = json.dumps([run.where, run.args], sort_keys=True)
        families[family][setting].append(run)

    found = []
    for family in families.values():
        names = differing([same[0].args for same in family.values()])
        for same in family.values():
            args = same[0].args
            found.append(Row(same, {n: args[n] for n in names if args.get(n) is not None}))
    return sorted(found, key=_order)


def _order(row: Row) -> tuple:
    first = row.first
    names = row.where["method"], row.where["data"], row.where.get("split", "")
    return first.classifies, *names, first.order, -len(row.runs), str(row.apart)


def not_averaged(found: list[Row]) -> list[str]:
    """A line for each method, data and shots that has several rows: why."""
    places: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        places[_place(row.where)].append(row.first.args)
    return [
        f"Not averaged: {place} has {len(many)} rows, which differ in {told(differing(many), many)}."
        for place, many in places.items()
        if len(many) > 1
    ]


def _place(where: dict[str, str], but: str = "") -> str:
    """The first columns of a row in words, but for this one."""
    words = {"split": "split ", "shots": "shots ", "ways": "ways "}
    texts = [words.get(name, "") + value for name, value in where.items() if name != but]
    return ", ".join(text for text in texts if text != "split -")


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


def number(value: Value | None, digits: int) -> str:
    if value is None:
        return "-"
    return " ± ".join(f"{part:.{digits}f}" for part in value if part is not None)


def numbers(values: Mapping[str, Value], columns: Iterable[str]) -> list[str]:
    """Cells of these columns; accuracies have two digits."""
    return [number(values.get(column), 2 if "-shot" in column else 1) for column in columns]


def main_table(found: list[Row], metric: str) -> str:
    """Settings with their means, a row each, of detectors or of classifiers."""
    columns = list(dict.fromkeys(column for row in found for column in row.values))
    columns.sort(key=lambda c: GROUPS.index(c) if c in GROUPS else int(c.split("-")[0]))
    heads = [f"{metric} {column}" if column in GROUPS else column for column in columns]
    lines = [[*found[0].where, "seeds", *heads, "± over", "tested on", "differing in"]]
    for row in found:
        seeds = f"{len(row.runs)}: {', '.join(str(run.seed) for run in row.runs)}"
        cells = [row.over, row.first.test, named(row.apart)]
        lines.append([*row.where.values(), seeds, *numbers(row.values, columns), *cells])
    return markdown(lines)


def on_benchmark(found: list[Row]) -> list[Row]:
    """Those that kept to CD-FSOD's protocol, as their results tell."""
    kept = [row for row in found if row.first.args.get("benchmark") == cd_fsod.NAME]
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
    for row in sorted(found, key=lambda row: (row.first.order, row.where["method"])):
        groups[row.where["method"], row.where["shots"]].append(row)

    titles = [folders[0] for folders in cd_fsod.FOLDERS.values()]
    lines, spread = [["method", "shots", *titles, "mean", "differing in"]], []
    for (method, shots), group in groups.items():
        for setting, same in _across_data(group).items():
            values = {row.where["data"]: row.values["all"] for row in same}
            if len(values) == len(cd_fsod.FOLDERS):
                values["mean"] = sum(value for value, _ in values.values()) / len(values), None
            lines.append([method, shots, *numbers(values, [*cd_fsod.FOLDERS, "mean"]), setting])

            args = [row.first.args for row in same]
            others = [name for name in differing(args) if name not in OF_DATA]
            if others:
                what = f"Settings of {method}, shots {shots}, differ between data sets"
                spread.append(f"{what}: {told(others, args)}.")
    return "\n".join([markdown(lines), "", f"{cd_fsod.NAME}, {metric} of all classes.", *spread])


def _across_data(group: list[Row]) -> dict[str, list[Row]]:
    """Rows of several data sets by what differs within one of these."""
    by_data: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in group:
        by_data[row.where["data"]].append(row.first.args)
    names = dict.fromkeys(name for many in by_data.values() for name in differing(many))

    settings: dict[str, list[Row]] = defaultdict(list)
    for row in group:
        settings[named({name: row.first.args.get(name) for name in names})].append(row)
    return settings


def details(found: list[Row]) -> str:
    """Single runs: their results, and how these came about."""
    head = "run seed result base commit hardware processes precision time memory command"
    lines = [head.split()]
    for run in (run for row in found for run in row.runs):
        place = run.path.parent if run.path.name == "metrics.json" else run.path
        result = zip(run.values, numbers(run.values, run.values))
        about = {name: "-" if value is None else str(value) for name, value in run.about.items()}
        cells = {name: about.get(name, "-") for name in lines[0]}
        cells |= {"run": str(place), "seed": str(run.seed)}
        cells |= {"result": ", ".join(map(" ".join, result)), "base": cells["base"][:8]}

        commit = cells["commit"]
        if len(commit) > 10:
            cells["commit"] = commit[:10] + "+" * commit.endswith("+")
        if "seconds" in about:
            cells["time"] = str(timedelta(seconds=round(run.about["seconds"])))
        if "peak_memory_gb" in about:
            cells["memory"] = f"{about['peak_memory_gb']} GB"
        if "command" in about:
            cells["command"] = f"`{about['command']}`"
        lines.append(list(cells.values()))
    return markdown(lines)


def legend(found: list[Row]) -> str:
    """What ± stands for in these rows."""
    over = {row.over for row in found}
    kinds = {"seeds": "over seeds by Student's t", "tasks": "over the test tasks of the one run"}
    said = " or ".join(text for name, text in kinds.items() if name in over)
    return "All in percent." + (
        f" ± is half the 95 % interval of the mean, {said}." if said else ""
    )


def draw(found: list[Row], metric: str) -> Figure:
    """Results against shots, a line per method, data and setting, with intervals; "all" stands at
    the end.
    """
    panels = {f"{metric} of novel classes, %": _lines(found, False)}
    panels |= {"accuracy, %": _lines(found, True)}
    panels = {label: lines for label, lines in panels.items() if lines}
    if not panels:
        raise InputError("--plot: none of these runs has novel classes or shots")

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, lines) in zip(axes, panels.items()):
        shown = {shots for points in lines.values() for shots in points}
        places = {shots: int(shots) for shots in sorted(shown - {"all"}, key=int)}
        if "all" in shown:
            places["all"] = 2 * max(places.values(), default=0.5)
        for name, points in lines.items():
            points = {shots: points[shots] for shots in places if shots in points}
            x = [places[shots] for shots in points]
            y = [value for value, _ in points.values()]
            halves = [half or 0 for _, half in points.values()]
            style = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1}
            axis.errorbar(x, y, halves, label=name, **style)

        axis.set_xscale("log")
        axis.set_xticks(list(places.values()), list(places))
        axis.minorticks_off()
        axis.set_xlabel("shots")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _lines(found: list[Row], classifiers: bool) -> dict[str, dict[str, Value]]:
    """Points by name of the line and shots, of classifiers or of detectors of novel classes."""
    lines: dict[str, dict[str, Value]] = defaultdict(dict)
    for row in found:
        if row.first.classifies != classifiers or row.first.base:
            continue
        points = {column.removesuffix("-shot"): value for column, value in row.values.items()}
        if not classifiers:
            points = {row.where["shots"]: points["novel"]} if "novel" in points else {}
        if points:
            name = ", ".join(filter(None, (_place(row.where, but="shots"), named(row.apart))))
            lines[name] |= points
    return lines


def compare(a: Path, b: Path, metric: str) -> list[dict[str, Any]]:
    """Differences A - B of all that both have, paired by task or by seed; base training only if
    nothing else.

    Raises:
        InputError: they have nothing in common, several settings, other tasks or seeds, or were not
            tested alike.
    """
    left, right = _places(a, metric), _places(b, metric)
    common = [place for place in left if place in right]
    few = [place for place in common if not left[place][0].base]
    differences = []
    for place in few or common:
        over, of_a, of_b = _paired(place, [(a, left[place]), (b, right[place])])
        for column in (column for column in of_a if column in of_b):
            x, y = of_a[column], of_b[column]
            mean, half = mean_interval([one - other for one, other in zip(x, y, strict=True)])
            row = {"setting": place, "result": f"{metric} {column}" if column in GROUPS else column}
            row |= {"a": mean_interval(x)[0], "b": mean_interval(y)[0]}
            row |= {"difference": mean, "half": half, "pairs": len(x), "over": over}
            differences.append(row)

    sides = ((a, left), (b, right))
    if not differences:
        has = [
            f"{folder} has "
            + "; ".join(f"{place}: {', '.join(runs[0].values)}" for place, runs in side.items())
            for folder, side in sides
        ]
        raise InputError(f"nothing to compare: {', and '.join(has)}")
    for folder, side in sides:
        alone = [place for place in side if place not in common]
        if alone:
            print(f"Only in {folder}, not compared: {'; '.join(alone)}.\n")
    return differences


def _places(folder: Path, metric: str) -> dict[str, list[Run]]:
    """Its runs by seed, at each data and shots, whatever the method."""
    places: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(collect([folder], metric), key=lambda run: (run.order, run.seed)):
        places[_place(run.where, but="method")].append(run)
    return places


def _paired(
    place: str, sides: list[tuple[Path, list[Run]]]
) -> tuple[str, dict[str, list[float]], dict[str, list[float]]]:
    """What pairs are over, and their values in A and in B by column."""
    for folder, runs in sides:
        many = [run.args | {"method": run.where["method"]} for run in runs]
        names = differing(many)
        if names:
            raise InputError(
                f"{folder}: its runs of {place} differ in {told(names, many)}; name a folder or result file of one"
            )
        if len({run.seed for run in runs}) < len(runs):
            raise InputError(
                f"{folder}: a seed was run twice for {place}; name a folder with one run of each"
            )

    (a, left), (b, right) = sides
    tested = [{n: runs[0].args[n] for n in ALIKE if n in runs[0].args} for runs in (left, right)]
    names = differing(tested)
    if names:
        raise InputError(f"{a} and {b} were not tested alike for {place}: {told(names, tested)}")

    if left[0].classifies and len(left) == len(right) == 1:
        for folder, (run,) in sides:
            if run.tasks is None:
                raise InputError(
                    f"{folder} has no tasks.json with every task's accuracy: --test-only --save-tasks"
                )
        x, y = ({f"{k}-shot": many for k, many in run.tasks.items()} for run in left + right)
        return "tasks", x, y

    seeds = [", ".join(str(run.seed) for run in runs) for runs in (left, right)]
    if seeds[0] != seeds[1]:
        raise InputError(
            f"{a} has seeds {seeds[0]} and {b} {seeds[1]} for {place}: give the same seeds of both"
        )
    return "seeds", by_column(left), by_column(right)


def comparison(a: Path, b: Path, differences: list[dict[str, Any]]) -> str:
    """Differences as a table."""
    lines = [["setting", "result", "A", "B", "A - B", "95 % interval", "includes 0", "pairs"]]
    for row in differences:
        mean, half, interval, zero = row["difference"], row["half"], "-", "-"
        if half is not None:
            interval = f"{mean - half:.2f} to {mean + half:.2f}"
            zero = "yes" if abs(mean) <= half else "no"
        pairs = f"{row['pairs']} {row['over']}" if row["pairs"] > 1 else "1 seed: no interval"
        cells = [f"{row['a']:.2f}", f"{row['b']:.2f}", f"{mean:+.2f}", interval, zero, pairs]
        lines.append([row["setting"], row["result"], *cells])
    return f"A: {a}\nB: {b}\n\n{markdown(lines)}\n\nAll in percent; intervals by Student's t over the pairs."


def main(args: Args) -> None:
    metric = args.metric or ("AP" if args.cd_fsod else "AP50")
    content = (difference if args.compare else tables)(args, metric)
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def difference(args: Args, metric: str) -> list[dict[str, Any]]:
    """Print how two folders differ, and give what was printed."""
    if len(args.folders) != 2:
        raise InputError("--compare needs two folders or result files: --compare A B")
    for given, what in (
        (args.plot, "--plot draws runs over shots"),
        (args.cd_fsod, "--cd-fsod is a table of runs"),
    ):
        if given:
            raise InputError(f"{what}, not a difference: leave one of the two out")
    content = compare(*args.folders, metric)
    print(comparison(*args.folders, content))
    return content


def tables(args: Args, metric: str) -> list[dict[str, Any]]:
    """Print the tables of all runs, draw them if asked to, and give the rows."""
    found = rows(collect(args.folders, metric))
    if args.cd_fsod:
        found = on_benchmark(found)
        parts = [cd_fsod_table(found, metric)]
    else:
        kinds = [[r for r in found if r.first.classifies == kind] for kind in (False, True)]
        parts = [main_table(kind, metric) for kind in kinds if kind]
    parts.append("\n".join([legend(found), *not_averaged(found)]))
    if args.details:
        parts.append(details(found))
    print("\n\n".join(parts))

    if args.plot:
        try:
            draw(found, metric).savefig(args.plot, dpi=150)
        except ValueError as error:  # matplotlib's, of a suffix that it does not know
            raise InputError(f"--plot {args.plot}: {error}") from None
    return [_content(row) for row in found]


def _content(row: Row) -> dict[str, Any]:
    runs = []
    for run in row.runs:
        values = {column: value for column, (value, _) in run.values.items()}
        runs.append({"path": str(run.path), "seed": run.seed, "values": values, **run.about})
    about = {"args": row.first.args, "values": row.values, "over": row.over, "test": row.first.test}
    return {**row.where, **about, "runs": runs}


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
