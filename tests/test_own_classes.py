"""A folder of one's own: how its classes are divided, how long it is trained on, and what is wrong
with it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image
from runs import CLASSIFIERS, load, metrics, run_here

from fewshot import InputError, weights
from fewshot.data import episodes
from fewshot.data.classification import open_dataset, open_splits
from fewshot.training.plan import planned
from fewshot.training.schedule import Passes, Schedule

NAMES = [f"tool{i:02d}" for i in range(12)]


def folder(root: Path, names: list[str] = NAMES, pictures: int = 2) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(pictures):
            Image.new("RGB", (12, 12), (20 * number, 20 * i, 0)).save(root / name / f"{i}.png")
    return root


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def tools(tmp_path) -> Path:
    return folder(tmp_path / "tools")


# which class is in which split


def test_a_path_is_a_data_set(tools, tmp_path, monkeypatch):
    splits = open_splits(str(tools), "data")
    assert [len(part.classes) for part in splits] == [8, 2, 2] and {
        part.name for part in splits
    } == {"folder"}
    assert sorted(name for part in splits for name in part.classes) == NAMES
    monkeypatch.chdir(tmp_path)
    same = [
        open_splits(*where) for where in (("tools", "data"), ("tools", tmp_path), ("folder", tools))
    ]
    assert all(
        [part.classes for part in opened] == [part.classes for part in splits] for opened in same
    )
    assert (
        splits[2].origin == f"{tools} test"
        and open_dataset("glyphs", "", "val").origin == "glyphs val"
    )
    assert open_dataset(str(tools), "", "test", cache=True).pixels(0).shape == (3, 12, 12)
    assert len(list((tools / ".fewshot_cache").iterdir())) == 1
    with pytest.raises(
        InputError,
        match=r"^data set 'tols': must be one of glyphs, .* or a folder of class folders",
    ):
        open_splits("tols", tmp_path)


def test_novel_classes_are_tested_on_and_the_rest_divided(tools, tmp_path):
    novel = written(tmp_path / "novel.txt", "\ufefftool03\n\n  tool11 \r\ntool00\n")
    train, val, test = open_splits(str(tools), "", novel)
    assert (
        test.classes == ["tool00", "tool03", "tool11"]
        and len(train.classes) == 7
        and len(val.classes) == 2
    )
    assert sorted(train.classes + val.classes + test.classes) == NAMES
    assert test.origin == f"{tools} test (as {novel} divides it)"
    assert int(test.pixels(2)[0, 0, 0]) == 60  # of tool03
    others = [open_splits(str(tools), "", novel, seed=seed)[1].classes for seed in range(5)]
    assert others[0] == val.classes and any(other != val.classes for other in others)


def test_json_names_every_split(tools, tmp_path):
    division = {"train": ["tool05", "tool01"], "val": ["tool09"], "test": ["tool02", "tool00"]}
    splits = open_splits(str(tools), "", written(tmp_path / "division.json", division))
    assert [part.classes for part in splits] == [
        ["tool01", "tool05"],
        ["tool09"],
        ["tool00", "tool02"],
    ]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "tool00\ntool99\n", r"there is no class folder 'tool99'; write 'tool0?9'"),
        ("a.txt", "zebra", r"there is no class folder 'zebra'; the classes are tool00, tool01"),
        ("a.txt", "tool00\ntool01\ntool00", r"class 'tool00' is listed twice"),
        ("a.txt", " \n\n", r"names no class for test"),
        ("a.txt", "\n".join(NAMES), r"leaves none of 12 to train and to validate on; list fewer"),
        ("a.txt", "\n".join(NAMES[1:]), r"leaves class 'tool00' of 12 to train and to validate on"),
        (
            "a.json",
            {"train": NAMES[:4], "val": NAMES[3:6], "test": NAMES[6:]},
            r"class 'tool03' is listed twice",
        ),
        (
            "a.json",
            {"train": [], "val": NAMES[3:6], "test": NAMES[6:]},
            r"names no class for train; list one or more",
        ),
        (
            "a.json",
            {"train": NAMES[:4], "test": NAMES[6:]},
            r"must be an object of train, val and test, each a list",
        ),
        (
            "a.json",
            {"train": "tool00", "val": [], "test": []},
            r"must be an object of train, val and test",
        ),
        (
            "a.json",
            {"train": [1], "val": ["tool00"], "test": ["tool01"]},
            r"must be an object of train, val and test",
        ),
        ("a.json", NAMES, r"must be an object of train, val and test"),
        ("a.json", "tool00\ntool01", r"not json \(.*\); correct it, or give a \.txt"),
        ("a.txt", None, r"cannot be read: is it there\?"),
    ],
)
def test_what_is_wrong_with_a_division_is_said(tools, tmp_path, name, content, words):
    novel = tmp_path / name
    if content is not None:
        written(novel, content)
    with pytest.raises(InputError, match=words) as caught:
        open_splits(str(tools), "", novel)
    assert str(caught.value).startswith(str(novel)) and "\n" not in str(caught.value)


def test_divided_folders_are_taken_as_they_are(tmp_path):
    for part, names in (("train", ["a", "b"]), ("val", ["a", "c"]), ("test", ["d"])):
        folder(tmp_path / part, names)
    assert [part.classes for part in open_splits(str(tmp_path), "")] == [
        ["a", "b"],
        ["a", "c"],
        ["d"],
    ]
    with pytest.raises(
        InputError, match=r"is divided already, into train, val, test: leave --novel out"
    ):
        open_splits(str(tmp_path), "", written(tmp_path / "novel.txt", "d"))
    with pytest.raises(
        InputError, match=r"novel\.txt: glyphs has a published split; leave --novel out"
    ):
        open_splits("glyphs", "", tmp_path / "novel.txt")
    folder(tmp_path / "val", ["D"])  # the tested class, spelt in another way
    with pytest.raises(
        InputError,
        match=r"test/d: this class is also in val/, but few-shot tests are on classes not",
    ):
        open_dataset(str(tmp_path), "", "train")


def test_two_spellings_of_a_class_are_refused(tools):
    folder(tools, ["Tool 03"])
    with pytest.raises(
        InputError, match="tool03: differs from class 'Tool 03' only in case or blanks"
    ):
        open_splits(str(tools), "")


# how long


def args(**changed) -> SimpleNamespace:
    flags = {
        "batch_size": 8,
        "iters": None,
        "lr": None,
        "eval_every": 50,
        "test_only": False,
        "test_dataset": None,
    }
    return SimpleNamespace(**flags | changed)


def test_the_schedule_of_own_data_follows_from_its_pictures(tools, capsys):
    sets, row = (
        open_splits(str(tools), ""),
        Passes(100, 0.5, least=30, most=150),
    )  # 16 pictures to train on

    def plan(pictures: int = 1, **changed) -> tuple[Schedule, int]:
        return planned(Accelerator(), args(**changed), row, sets, pictures=pictures)

    schedule, every = plan()
    assert (schedule.steps, schedule.lr, schedule.batch, every) == (
        150,
        0.5,
        8,
        50,
    )  # 200, but at most 150
    assert plan(pictures=2)[0].steps == 100 and plan(batch_size=10, pictures=2)[0].steps == 80
    assert plan(pictures=100)[0].steps == 30  # at least
    assert plan(pictures=100)[1] == 3  # or it would not be validated before the end
    assert plan(pictures=100, iters=7)[0].steps == 7 and plan(lr=0.1)[0].lr == 0.1
    capsys.readouterr()
    plan(pictures=2)
    assert capsys.readouterr().out.splitlines() == [
        f"{tools} train: 16 pictures; classes: 8 to train, 2 to validate, 2 to test",
        "100 steps of 16 pictures: 100 passes; validated every 50",
    ]
    plan(test_only=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("recipe", CLASSIFIERS)
def test_published_schedules_stay_and_own_ones_lie_between(recipe):
    module = load(recipe)
    rows = {name: row[0] if recipe == "maml" else row for name, row in module.SCHEDULE.items()}
    own, quick = rows["folder"], rows["glyphs"]
    assert isinstance(own, Passes) and all(
        isinstance(row, Schedule) for name, row in rows.items() if name != "folder"
    )
    assert (
        own.passes == 100 and own.least == quick.steps and own.most == rows["mini_imagenet"].steps
    )
    glyphs = open_splits("glyphs", "")
    defaults = module.Args()
    batch = module.SCHEDULE["glyphs"][1] if recipe == "maml" else None
    schedule, every = planned(Accelerator(), defaults, quick, glyphs, batch=batch)
    assert (
        schedule.steps == quick.steps
        and every == defaults.eval_every
        and schedule.milestones == quick.milestones
    )


# what it takes of every class


def test_errors_name_the_flag_the_class_and_its_pictures(tools, tmp_path):
    (tools / "tool05" / "1.png").unlink()
    novel = written(tmp_path / "novel.txt", "tool05\ntool06")
    test = open_splits(str(tools), "", novel)[2]
    with pytest.raises(InputError) as caught:
        episodes.check(test, 3, 1, 1)
    wanted = f"--ways 3: {tools} test (as {novel} divides it) has 2 classes; ask for fewer, or add classes"
    assert str(caught.value) == wanted
    with pytest.raises(InputError) as caught:
        episodes.check(test, 2, 1, 1)
    wanted = f"class tool05 of {tools} test (as {novel} divides it): has 1 picture, --shots 1 and --queries 1 take 2; "
    assert str(caught.value) == wanted + "give fewer --shots and --queries, or add pictures"
    val = open_dataset(str(tools), "", "val")
    with pytest.raises(
        InputError,
        match="has 2 pictures, --train-shots 1 and --train-queries 5 take 6; give at most --",
    ):
        episodes.check(val, 2, 1, 5, episodes.TRAIN_FLAGS)


FLAGS = "--ways 2 --shots 1 --queries 1 --tasks 3 --val-tasks 2 --workers 0"


def test_a_recipe_on_a_folder_of_ones_own(tools, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "novel.txt", "tool00\ntool03\ntool11")
    run_here(
        "proto_net",
        f"{FLAGS} --dataset tools --novel novel.txt --train-shots 1 --train-queries 1 --iters 2",
    )
    said = capsys.readouterr().out
    assert (
        "14 pictures; classes: 7 to train, 2 to validate, 3 to test\n2 steps of 10 pictures" in said
    )
    out = tmp_path / "runs" / "proto_net" / "tools-novel-conv4-seed0"
    assert metrics(out)["settings"]["trained"]["novel"] == "novel.txt"
    about = weights.describe_file(out / "model.safetensors")
    assert len(about["classes"]) == 7 and not {"tool00", "tool03", "tool11"} & set(about["classes"])


@pytest.mark.parametrize(
    "recipe, flags, words",
    [
        ("baseline", "--ways 3", "--ways 3: .*val has 2 classes"),
        ("baseline", "--shots 2", "--shots 2 and --queries 1 take 3"),
        ("maml", "--train-shots 1 --train-queries 1 --ways 9", "--ways 9: .*val has 2 classes"),
        (
            "maml",
            "--train-shots 1",
            "--train-shots 1 and --train-queries 16 take 17; give at most --train-queries 1",
        ),
        ("matching_net", "--train-ways 9", "--train-ways 9: .*train has 8 classes"),
        (
            "relation_net",
            "",
            "--train-shots 5 and --train-queries 16 take 21; give fewer --train-shots and --train-q",
        ),
    ],
)
def test_recipes_name_the_flag_to_change(tools, tmp_path, recipe, flags, words):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        run_here(recipe, f"{FLAGS} --dataset {tools} --out {tmp_path / 'run'} {flags}")
    assert not (tmp_path / "run").exists()
