"""scripts/results.py: what is averaged and what is not, intervals, paired differences, the picture
over shots.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image

from fewshot import InputError

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
results = importlib.import_module("results")

TRAINED = {"dataset": "glyphs", "lr": None, "shot_lists": None}
RUN = {
    "command": "recipes/tfa.py --shots 5",
    "commit": "abcdef0123456789+",
    "hardware": "a | b",
    "processes": 1,
    "precision": "no",
    "seconds": 3725.4,
    "peak_memory_gb": 1.25,
    "base": "0123456789abcdef" * 4,
}


def call(*flags: Any) -> None:
    results.main(tyro.cli(results.Args, args=[str(flag) for flag in flags]))


@pytest.fixture
def printed(capsys) -> Callable[..., str]:
    """What the script prints with these flags."""

    def run(*flags: Any) -> str:
        call(*flags)
        return capsys.readouterr().out

    return run


def refused(words: str, *flags: Any) -> None:
    with pytest.raises(InputError, match=words) as error:
        call(*flags)
    assert "\n" not in str(error.value)


def holds(row: dict[str, str], **cells: str) -> bool:
    """Has this row these cells? Blanks in their heads are _ here."""
    return row.items() >= {name.replace("_", " "): cell for name, cell in cells.items()}.items()


def write(
    path: Path, result: dict, method: str, seed: int, trained: dict, tested: dict, **settings: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    id = str(path).replace("-", "")
    who = {"method": method, "seed": seed, "trained": trained, "tested": tested, "id": id}
    path.write_text(json.dumps({**result, "settings": {**who, **settings}}))
    return path


def detector(
    folder: Path, seed: int, novel: float, shots: int | str = 5, method: str = "tfa", **more: Any
) -> Path:
    """A finished run; `more` goes into its protocol, its provenance or its arguments, wherever such
    a thing is.
    """
    protocol = {
        "dataset": "glyphs",
        "split": 1,
        "stage": "finetune",
        "trained_on": "base and novel classes",
        "shots": f"{shots} of each, drawn by seed {seed}",
        "test_pictures": 500,
        "test_objects": 1200,
    }
    trained, run = dict(TRAINED), dict(RUN)
    for name, value in more.items():
        next((d for d in (protocol, run) if name in d), trained)[name] = value
    trained["dataset"] = protocol["dataset"]
    result = {
        "AP50": {"base": 80.0, "novel": novel, "all": 70.0},
        "AP75": {"all": 1.0},
        "protocol": protocol,
    }
    return write(folder / "metrics.json", result, method, seed, trained, {"shots": shots}, run=run)


def classifier(
    folder: Path, seed: int, accuracies: dict[str, list[float]], method: str = "proto_net", **more
) -> Path:
    tasks = len(next(iter(accuracies.values())))
    shots = {k: {"accuracy": float(np.mean(v)), "ci95": 0.3} for k, v in accuracies.items()}
    tested = {"ways": 5, "shots": [int(k) for k in accuracies], "queries": 15, "tasks": None} | more
    result = {"ways": tested["ways"], "tasks": tasks, "shots": shots}
    path = write(folder / "metrics.json", result, method, seed, {"dataset": "cub"}, tested)
    (folder / "tasks.json").write_text(json.dumps(accuracies))
    return path


def cells(text: str) -> list[dict[str, str]]:
    """The rows of all Markdown tables, by head."""
    found, head = [], None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = row
        elif set(line) - set("|- "):
            found.append(dict(zip(head, row, strict=True)))
    return found


@pytest.fixture
def runs(tmp_path) -> Path:
    """A detector's base model and three seeds at 5 shots, with copies of these; a classifier of two
    seeds.
    """
    for seed, novel in [(0, 40.0), (1, 44.0), (2, 48.0)]:
        path = detector(tmp_path / "tfa" / f"5shot-seed{seed}", seed, novel)
        shutil.copytree(path.parent, tmp_path / "copies" / str(seed))
    protocol = {"dataset": "glyphs", "split": 1, "stage": "base", "trained_on": "base classes"}
    result = {"AP50": {"base": 90.0, "all": 90.0}, "protocol": protocol}
    write(tmp_path / "tfa" / "base" / "metrics.json", result, "tfa", 0, TRAINED, {"shots": 5})
    for seed, accuracy in [(0, 60.0), (1, 62.0)]:
        accuracies = {"1": [accuracy] * 4, "5": [80.0] * 4}
        classifier(tmp_path / "proto" / f"seed{seed}", seed, accuracies)
    return tmp_path


def test_seeds_are_averaged_with_the_interval_of_their_mean(runs, printed):
    said = printed(runs, "--json", runs / "rows.json")  # copies count once
    base, tuned, few, *single = cells(said)
    assert base == {
        "method": "tfa", "data": "glyphs", "split": "1", "shots": "base", "seeds": "1: 0", "AP50 base": "90.0",
        "AP50 novel": "-", "AP50 all": "90.0", "± over": "-", "tested on": "-",
    }  # fmt: skip
    # Student's t of two degrees of freedom is 4.303, and the standard deviation 4
    numbers = {"AP50_novel": f"44.0 ± {4.303 * 4 / 3**0.5:.1f}", "AP50_all": "70.0 ± 0.0"}
    assert holds(tuned, seeds="3: 0, 1, 2", shots="5", **numbers)
    assert holds(tuned, tested_on="500 pictures, 1200 objects", **{"± over": "seeds"})
    # of one degree 12.706: two seeds say little
    assert (few["1-shot"], few["5-shot"], few["ways"]) == ("61.00 ± 12.71", "80.00 ± 0.00", "5")
    assert few["tested on"] == "4 tasks" and "Not averaged" not in said
    assert "over seeds by Student's t" in said and "over the test tasks" not in said
    assert len(single) == 6
    mine = next(row for row in single if row["result"] == "base 80.0, novel 44.0, all 70.0")
    assert holds(mine, run=str(runs / "copies" / "1"), seed="1", base="01234567")
    assert holds(mine, commit="abcdef0123+", time="1:02:05", memory="1.25 GB")
    assert holds(mine, command="`recipes/tfa.py --shots 5`", hardware="a \\| b")
    rows = json.loads((runs / "rows.json").read_text())
    assert [len(row["runs"]) for row in rows] == [1, 3, 2]
    assert rows[1]["values"]["novel"] == pytest.approx([44, 4.303 * 4 / 3**0.5])
    assert [run["values"]["novel"] for run in rows[1]["runs"]] == [40, 44, 48]

    said = printed(runs / "proto" / "seed0", "--no-details")
    (row,) = cells(said)
    assert row["1-shot"] == "60.00 ± 0.30" and "over the test tasks of the one run" in said
    assert cells(printed(runs, "--metric", "AP75"))[0]["AP75 all"] == "1.0 ± 0.0"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("lr", 0.5, "lr (default / 0.5)"),
        ("shot_lists", "lists", "shot_lists (default / lists)"),
        ("dataset", "other/glyphs", "dataset (glyphs / other/glyphs)"),
        ("stage", "novel", "stage (finetune / novel)"),
        ("trained_on", "novel classes", "trained_on (base and novel classes / novel classes)"),
        ("test_pictures", 20, "test_pictures (500 / 20)"),
        ("base", "f" * 64, "base (01234567 / ffffffff)"),
        ("precision", "bf16", "precision (no / bf16)"),
    ],
)
def test_what_differs_is_not_averaged_but_named(runs, printed, name, value, shown):
    detector(runs / "tfa" / "other", 3, 9.0, **{name: value})
    said = printed(runs / "tfa", "--no-details")
    assert (
        f"Not averaged: tfa, glyphs, split 1, shots 5 has 2 rows, which differ in {shown}." in said
    )
    rows = [row for row in cells(said) if row["shots"] == "5"]
    assert {row["AP50 novel"] for row in rows} == {"44.0 ± 9.9", "9.0"}
    alone = next(row for row in rows if row["AP50 novel"] == "9.0")
    assert alone["seeds"] == "1: 3" and alone["differing in"].startswith(name)


def test_what_may_differ_is_averaged(runs, printed):
    apart = {"seconds": 1.0, "commit": "f" * 40, "command": "x", "hardware": "another"}
    detector(runs / "tfa" / "other", 3, 40.0, **apart)
    rows = cells(printed(runs / "tfa", "--no-details"))
    assert [row["seeds"] for row in rows] == ["1: 0", "4: 0, 1, 2, 3"]


def test_a_seed_that_was_run_twice_does_not_count_twice(runs, printed):
    detector(runs / "tfa" / "again", 1, 46.0)
    said = printed(runs / "tfa", "--no-details")
    seeds = [(row["seeds"], row["differing in"]) for row in cells(said)]
    assert seeds == [("1: 0", ""), ("3: 0, 1, 2", ""), ("1: 1", "repetition 2")]
    assert "which differ in repetition (default / 2)" in said


def test_a_test_of_another_kind_has_its_own_row(runs, printed):
    run = runs / "proto" / "seed0"
    content = json.loads((run / "metrics.json").read_text())
    content["settings"]["id"] += "-0123abcd"
    (run / "test-0123abcd.json").write_text(json.dumps(content))  # as the run tested itself
    content["ways"], content["settings"]["tested"]["ways"] = 20, 20
    (run / "test-4567abcd.json").write_text(json.dumps(content))
    (run / "test-4567abcd-tasks.json").write_text("{}")
    own, other = cells(printed(runs / "proto", "--no-details"))
    assert holds(own, ways="5", seeds="2: 0, 1") and holds(other, ways="20", seeds="1: 0")
    table, details = cells(printed(run / "test-4567abcd.json"))
    assert table["ways"] == "20" and "ways" not in details


def test_what_is_wrong_is_said_in_a_line(runs, tmp_path):
    bad = tmp_path / "bad" / "metrics.json"
    bad.parent.mkdir()
    bad.write_text('{"AP50": {}}')
    for flags, words in [
        ([runs / "nothing"], "no finished run"),
        ([runs / "tfa", "--metric", "AP99"], "AP99"),
        ([runs], "bad/metrics.json: not a result with its settings"),
        (
            [runs / "tfa" / "base", "--plot", tmp_path / "x.png"],
            "--plot: none of these runs has novel",
        ),
        ([runs / "tfa", "--plot", tmp_path / "x.xyz"], "--plot .*x.xyz"),
        ([runs, "--compare"], "two folders"),
        ([runs, runs, "--compare", "--plot", tmp_path / "x.png"], "--plot"),
    ]:
        refused(words, *flags)


def test_the_difference_of_two_classifiers_is_paired_by_task(tmp_path, printed):
    rng = np.random.default_rng(0)
    hard = rng.uniform(40, 90, 200)  # how hard a task is, which both feel
    a = {"1": hard + 2 + rng.normal(0, 3, 200), "5": hard}
    b = {"1": hard, "5": hard + rng.normal(0, 3, 200)}
    for name, method, accuracies in (("a", "proto_net", a), ("b", "maml", b)):
        lists = {shots: values.tolist() for shots, values in accuracies.items()}
        classifier(tmp_path / name, 0, lists, method=method)
    flags = ("--compare", "--json", tmp_path / "rows.json")
    one, five = cells(printed(tmp_path / "a", tmp_path / "b", *flags))
    difference = a["1"] - b["1"]
    mean = difference.mean()
    # a t of 199 degrees of freedom is the normal one to 1 %
    half = 1.96 * difference.std(ddof=1) / 200**0.5
    assert holds(one, setting="cub, ways 5", result="1-shot", pairs="200 tasks", includes_0="no")
    assert one["A - B"] == f"{mean:+.2f}"
    low, high = map(float, one["95 % interval"].split(" to "))
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high - low == pytest.approx(2 * half, rel=0.03)
    # unpaired, the tasks' own spread would drown it
    assert 1.96 * (a["1"].var() + b["1"].var()) ** 0.5 / 200**0.5 > 2 and low > 1
    assert five["includes 0"] == "yes"
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0]["a"] == pytest.approx(a["1"].mean())
    assert rows[0]["difference"] == pytest.approx(mean)

    classifier(tmp_path / "c", 0, {"1": [50.0] * 200}, queries=10)
    classifier(tmp_path / "d", 0, {"1": [50.0] * 100})
    classifier(tmp_path / "e", 0, {"1": [50.0] * 200}, ways=20)
    classifier(tmp_path / "f", 0, {"20": [50.0] * 200})
    classifier(tmp_path / "g", 0, {"1": [50.0] * 200})
    (tmp_path / "g" / "tasks.json").unlink()
    for other, words in [
        ("c", r"not tested alike for cub, ways 5: queries \(15 / 10\)"),
        ("d", r"tasks \(200 / 100\)"),
        (
            "e",
            "nothing to compare: .*a has cub, ways 5: 1-shot, 5-shot, and .*e has cub, ways 20: 1-shot",
        ),
        ("f", "nothing to compare: .*f has cub, ways 5: 20-shot"),
        ("g", "g has no tasks.json .*: --test-only --save-tasks"),
    ]:
        refused(words, tmp_path / "a", tmp_path / other, "--compare")
    # a later test leaves the tasks' accuracies
    content = (tmp_path / "g" / "metrics.json").read_text()
    (tmp_path / "g" / "test-0123abcd.json").write_text(content)
    (tmp_path / "g" / "test-0123abcd-tasks.json").write_text(json.dumps({"1": hard.tolist()}))
    (same,) = cells(printed(tmp_path / "g", tmp_path / "b", "--compare"))
    nothing = {"A - B": "+0.00", "95 % interval": "0.00 to 0.00"}
    assert holds(same, includes_0="yes", **nothing)


def test_the_difference_of_two_detectors_is_paired_by_seed(runs, tmp_path, printed):
    a, b = runs / "tfa", tmp_path / "fsce"
    for seed, novel in [(0, 39.0), (1, 42.0), (2, 45.0)]:
        detector(b / f"5shot-seed{seed}", seed, novel, method="fsce", lr=0.1)
    detector(b / "1shot-seed0", 0, 20.0, shots=1, method="fsce")
    said = printed(a, b, "--compare")
    row = {row["result"]: row for row in cells(said)}["AP50 novel"]
    half = 4.303 / 3**0.5  # differences 1, 2, 3
    assert holds(row, A="44.00", B="42.00", pairs="3 seeds", includes_0="yes")
    assert row["A - B"] == "+2.00" and row["95 % interval"] == f"{2 - half:.2f} to {2 + half:.2f}"
    assert f"Only in {b}, not compared: glyphs, split 1, shots 1." in said
    for folder, shots in ((a, 1), (a, 10), (b, 10)):
        method = "tfa" if folder == a else "fsce"
        detector(folder / f"{shots}shot-seed0", 0, 25.0, shots=shots, method=method)
    rows = cells(printed(a, b, "--compare"))
    assert [row["setting"].split()[-1] for row in rows] == ["1"] * 3 + ["5"] * 3 + ["10"] * 3
    (row,) = (row for row in rows[:3] if row["result"] == "AP50 novel")
    assert holds(row, setting="glyphs, split 1, shots 1", pairs="1 seed: no interval")
    assert row["A - B"] == "+5.00" and row["95 % interval"] == "-"

    def also(name: str, seed: int, **more: Any) -> Path:
        return detector(b / name, seed, 45.0, method="fsce", **more)

    seeds = r"tfa has seeds 0, 1, 2 and .*fsce 0, 1, 2, 3 for glyphs, split 1, shots 5"
    settings = r"its runs of glyphs, split 1, shots 5 differ in lr \(0.1 / 0.2\)"
    for name, seed, lr, words in [
        ("5shot-seed3", 3, 0.1, seeds),
        ("5shot-seed3", 3, 0.2, settings),
        ("again", 0, 0.1, "a seed was run twice"),
    ]:
        path = also(name, seed, lr=lr)
        refused(words, a, b, "--compare")
        path.unlink()

    for seed in range(3):
        also(f"5shot-seed{seed}", seed, trained_on="novel classes")
    words = r"not tested alike .*trained_on \(base and novel classes / novel classes\)"
    refused(words, a, b, "--compare")


def target(
    folder: Path,
    name: str,
    value: float,
    *,
    method: str = "tfa",
    shots: int = 5,
    seed: int = 0,
    **more,
) -> Path:
    """A finished run of CD-FSOD's protocol, or with `benchmark` None one that did not keep to it."""
    path = detector(
        folder / f"{method}-{name}-{shots}-{seed}", seed, 1.0, shots, method, dataset=name, **more
    )
    content = json.loads(path.read_text())
    content["AP"] = {"novel": value, "all": value}
    benchmark = more.get("benchmark", "CD-FSOD")
    content["protocol"] |= {"split": None, "benchmark": benchmark}
    path.write_text(json.dumps(content))
    return path


SIX = {
    "artaxor": 10.0,
    "clipart1k": 20.0,
    "dior": 30.0,
    "deepfish": 40.0,
    "neu_det": 50.0,
    "uodd": 66.0,
}


def test_cd_fsod_in_the_benchmarks_form(tmp_path, printed):
    for name, value in SIX.items():
        target(tmp_path, name, value, test_proposals=len(name))
        target(tmp_path, name, value + 2, seed=1, test_proposals=len(name))
        target(tmp_path, name, value / 2, shots=1)
    for name in ("uodd", "artaxor"):
        target(tmp_path, name, 7.0, method="fsce", shots=1, lr={"uodd": 0.1, "artaxor": 0.2}[name])
    target(
        tmp_path / "own", "neu_det", 99.0, benchmark=None
    )  # such as one's own folder of that name
    detector(tmp_path / "glyphs", 0, 99.0)
    said = printed(tmp_path, "--cd-fsod", "--no-details", "--json", tmp_path / "rows.json")
    fsce, one, five = cells(said)
    head = ["method", "shots", "ArTaxOr", "clipart1k", "DIOR", "FISH", "NEU-DET", "UODD", "mean"]
    assert list(five) == list(one) == head
    assert list(one.values()) == ["tfa", "1", "5.0", "10.0", "15.0", "20.0", "25.0", "33.0", "18.0"]
    # two seeds of each: a t of one degree, 12.706, times their standard deviation over the root of
    # two is 12.706
    assert five["UODD"] == "67.0 ± 12.7" and five["mean"] == "37.0"
    # no mean of a part
    assert list(fsce.values()) == ["fsce", "1", "7.0", *"----", "7.0", "-"]
    assert "Settings of fsce, shots 1, differ between data sets: lr (0.2 / 0.1)." in said
    assert "test_proposals" not in said and "AP of all classes" in said and "99.0" not in said
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 14
    rows = cells(printed(tmp_path, "--cd-fsod", "--metric", "AP50", "--no-details"))
    assert [row["mean"] for row in rows] == ["-", "70.0", "70.0"]


def test_cd_fsods_settings_have_rows_of_their_own_across_data_sets(tmp_path, printed):
    for name, value in SIX.items():
        for base, more in (("a" * 64, 0), ("b" * 64, 6)):
            target(tmp_path / base[0], name, value + more, base=base)
    rows = cells(printed(tmp_path, "--cd-fsod", "--no-details"))
    means = {row["differing in"]: row["mean"] for row in rows}
    assert means == {"base aaaaaaaa": "36.0", "base bbbbbbbb": "42.0"}


def test_cd_fsod_without_its_runs_is_refused(runs):
    for flags, message in [
        ([runs, "--metric", "AP50"], "none of these runs kept to CD-FSOD's protocol"),
        ([runs, runs, "--compare"], "leave one of the two out"),
    ]:
        refused(message, *flags, "--cd-fsod")


def test_the_picture_over_shots_has_whole_numbers(runs, tmp_path):
    for shots in (1, 2, 3, 10, 30, "all"):
        for seed, novel in [(0, 10.0), (1, 20.0)]:
            detector(runs / "tfa" / f"{shots}shot-seed{seed}", seed, novel, shots=shots)
    detector(runs / "tfa" / "lr", 0, 5.0, lr=0.5, shots=3)
    found = results.rows(results.collect([runs], "AP50"))
    figure = results.draw(found, "AP50")
    detectors, classifiers = figure.axes
    for axis, shots in ((detectors, "1 2 3 5 10 30 all"), (classifiers, "1 5")):
        assert [label.get_text() for label in axis.get_xticklabels()] == shots.split()
    assert not len(detectors.get_xticks(minor=True))
    assert detectors.get_ylabel() == "AP50 of novel classes, %"
    names = detectors.get_legend_handles_labels()[1]
    assert names == ["tfa, glyphs, split 1", "tfa, glyphs, split 1, lr 0.5"]
    line, _, (bars,) = detectors.containers[0]
    assert line.get_xdata().tolist() == [1, 2, 3, 5, 10, 30, 60]
    assert line.get_ydata().tolist() == [15] * 3 + [44] + [15] * 3
    heights = [np.ptp(segment[:, 1]) / 2 for segment in bars.get_segments()]
    assert heights[3] == pytest.approx(4.303 * 4 / 3**0.5)
    assert heights[0] == pytest.approx(12.706 * 50**0.5 / 2**0.5)
    call(runs, "--plot", tmp_path / "plot.png", "--no-details")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1650, 600)
