"""The recipes as users run them: end to end on the embedded data, killed and resumed, in bf16, and
as the documentation says.
"""

import dataclasses
import io
import json
import re
import shutil
import signal
import tokenize
from pathlib import Path
from typing import get_args

import pytest
import several
import torch
from first_losses import flags_of_test
from runs import (
    CLASSIFIERS,
    DETECTORS,
    EPISODIC,
    EVERY,
    FEW,
    FROZEN,
    PROTOTYPES,
    QUICK,
    RECIPES,
    ROOT,
    differences,
    files,
    killed,
    launch,
    load,
    metrics,
    parse,
    result_of,
    results_of_tests,
    run_here,
    some,
)
from safetensors.torch import load_file

from fewshot import weights
from fewshot.data.classification import DatasetName
from fewshot.detectors.meta_rcnn import MetaDetector

# lines beyond the others' bound, for published tables: of two settings, of two stages' batches, of
# backbones and shots
TABLES = {"defrcn": 14, "mpsr": 10, "attention_rpn": 22, "feat": 30}


def number_of_lines(source: str) -> int:
    """Lines of a file as if every statement had one, since the formatter breaks the longer ones."""
    depth, lines = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type == tokenize.NEWLINE or (token.type == tokenize.NL and depth == 0):
            lines += 1
        if token.type == tokenize.STRING and depth == 0:  # a docstring
            lines += token.end[0] - token.start[0]
    return lines


@pytest.mark.parametrize("recipe", EVERY)
def test_copies_stay_in_line(recipe):
    """Recipes repeat each other on purpose; this is what keeps the copies alike."""
    source = (ROOT / "recipes" / f"{recipe}.py").read_text()
    assert re.search(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", source.split('"""')[1]), (
        "the docstring cites the paper"
    )
    trains = recipe in RECIPES
    sections = ("data", "model", "train", "test") if trains else ("data", "model", "test")
    order = [source.rindex(f"# {section}\n") for section in sections]
    assert order == sorted(order)
    assert f'METHOD = "{recipe}"' in source and source.count(f'"{recipe}"') == 1, (
        "METHOD alone names the method"
    )
    if recipe in DETECTORS:
        functions = re.findall(r"^def (\w+)", source, re.M)
        assert [
            name for name in ("main", "train_base", "finetune", "fit") if name not in functions
        ] == []
        inside = source[source.index("def train_base") : source.index("if __name__")]
        assert "args.stage" not in inside, "no stage asks which stage it is"
    most = 190 if recipe in DETECTORS + PROTOTYPES else 140 if trains else 120
    assert number_of_lines(source) <= most + TABLES.get(recipe, 0)
    fields = {f.name: f for f in dataclasses.fields(load(recipe).Args)}
    common = [
        "dataset",
        "data_root",
        "shots",
        "seed",
        "workers",
        "out",
        "resume",
        "overwrite",
        "test_only",
        "wandb",
    ]
    of_classifiers = ["init", "backbone", "weights", "size", "imbalance"]
    of_prototypes = ["base", "backbone", "weights", "seeds", "calibrate", "scramble_supports"]
    common += (
        ["iters", "batch_size", "lr"]
        if trains
        else of_prototypes
        if recipe in PROTOTYPES
        else of_classifiers
    )
    assert not [name for name in common if name not in fields]
    names = ("glyphs", "voc", "coco", "own") if recipe in DETECTORS else get_args(DatasetName)
    assert not trains or set(load(recipe).SCHEDULE) == set(names), "a data set without a schedule"
    for name in fields:  # every flag is explained in --help
        assert re.search(rf"^    {name}: .*  # .+", source, re.M), f"{name} has no comment"


def readme_commands() -> list[tuple[str, str]]:
    text = (ROOT / "README.md").read_text() + (ROOT / "recipes" / "README.md").read_text()
    text += "".join((ROOT / "recipes" / f"{r}.py").read_text().split('"""')[1] for r in EVERY)
    found = re.findall(r"accelerate launch (?:--\S+ \S+ )*recipes/(\w+)\.py(.*)", text)
    return [(recipe, re.split("[`#|]", flags)[0].strip()) for recipe, flags in found]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_every_command_in_the_documentation_parses():
    commands = readme_commands()
    assert len(commands) >= 6
    for recipe, flags in commands:
        if (ROOT / "recipes" / f"{recipe}.py").exists():
            parse(recipe, flags.replace("DIR", "data"))
        else:
            assert recipe == "my_method", f"the documentation names recipes/{recipe}.py"


@pytest.fixture
def other(tmp_path) -> Path:
    """A model file that has nothing of a recipe's."""
    weights.save(tmp_path / "other.safetensors", torch.nn.Linear(2, 2), {})
    return tmp_path / "other.safetensors"


@pytest.mark.parametrize("recipe", CLASSIFIERS)
def test_classifier_end_to_end(recipe, finished, tmp_path):
    run = shutil.copytree(finished(recipe), tmp_path / "run")
    result = metrics(run)
    assert result["ways"] == 5 and result["tasks"] == 7 and set(result["shots"]) == {"1", "5"}
    for shots in result["shots"].values():
        # chance is 20, and few steps were taken
        assert 15 <= shots["accuracy"] <= 100 and shots["ci95"] >= 0

    before = files(run)
    run_here(recipe, f"{flags_of_test(recipe)} --save-tasks --out {run}")  # the file says the rest
    assert files(run) == before
    (again,) = results_of_tests(run)
    assert again | {"settings": 0} == result | {"settings": 0}
    tasks = json.loads(next(run.glob("test-*-tasks.json")).read_text())
    mean = sum(tasks["5"]) / len(tasks["5"])
    assert mean == pytest.approx(result["shots"]["5"]["accuracy"], abs=1e-3)


def test_the_documentations_own_recipe_runs(tmp_path, monkeypatch):
    """README, "Your own recipe": copy, change ten lines, run, from any folder."""
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in python_blocks() if "class Cosine" in block]
    built = "FewShotClassifier(backbone, Cosine())"
    assert built in (ROOT / "README.md").read_text()

    source = (ROOT / "recipes" / "proto_net.py").read_text()
    source = re.sub(r"FewShotClassifier\(backbone, .*", built, source)
    imports = "from torch import Tensor, nn\n\n\n"
    source = source.replace("def main(", f"{imports}{block}\n\ndef main(", 1)
    source = source.replace('METHOD = "proto_net"', 'METHOD = "my_method"')
    copy = tmp_path / "my_method.py"
    copy.write_text(source)
    run_here(copy, FEW["proto_net"])

    folder = tmp_path / "runs" / "my_method" / "glyphs-conv4-seed0"
    assert "head.log_temperature" in load_file(folder / "model.safetensors")
    assert weights.describe_file(folder / "model.safetensors")["method"] == "my_method"


def test_the_documentations_own_detector_runs(tmp_path, monkeypatch):
    """README, "Your own recipe": a detector that aggregates in another way, trained, tested as
    trained, and loaded.
    """
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in python_blocks() if "class MyDetector" in block]
    (use,) = [block for block in python_blocks() if "rebuilt(MyDetector" in block]

    source = (ROOT / "recipes" / "meta_rcnn.py").read_text()
    source = source.replace('METHOD = "meta_rcnn"', 'METHOD = "my_detector"')
    tables, functions = source.split("def main(")
    tables = tables.replace("import MetaRCNN", "import MetaDetector")
    functions = functions.replace("MetaRCNN", "MyDetector")
    copy = tmp_path / "my_detector.py"
    copy.write_text(f"{tables}from torch import Tensor\n\n{block}\n\ndef main({functions}")
    run_here(copy, f"{FEW['meta_rcnn']} --shots 10")

    names = {"MetaDetector": MetaDetector, "Tensor": torch.Tensor}
    exec(block + use, names)
    assert type(names["model"].network).__name__ == "MyDetector"
    assert names["model"].about["method"] == "my_detector"


def test_the_documentations_use_of_models_runs(finished, tmp_path, monkeypatch):
    """README, "Use a model", as written, on models like those that its commands leave behind, here
    after a few steps.
    """
    monkeypatch.chdir(tmp_path)
    for stage, run in (("2shot-seed0", "meta_rcnn"), ("base", "attention_rpn")):
        place = tmp_path / "runs" / run / "glyphs-split1-small" / stage.replace("2shot", "10shot")
        shutil.copytree(finished(run) / stage, place)
    blocks = [block for block in python_blocks() if "fewshot.load" in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "found.png").exists() and (tmp_path / "never_trained.png").exists()


def test_a_trained_backbone_can_be_taken_over(finished, other, tmp_path, capsys):
    model = finished("baseline") / "model.safetensors"
    a = load_file(model)
    for recipe, init in (("meta_baseline", model), ("feat", model.parent), ("frn", model.parent)):
        run_here(recipe, f"{FEW[recipe]} --lr 0 --init {init} --out {tmp_path / recipe}")
        b = load_file(tmp_path / recipe / "model.safetensors")
        names = [
            name for name in a if name.startswith("features.") and name.endswith(("weight", "bias"))
        ]
        assert len(names) == 16 and all(torch.equal(a[name], b[name]) for name in names)
    assert "no --init" not in capsys.readouterr().out

    run_here("feat", f"{FEW['feat']} --out {tmp_path / 'scratch'}")
    said = capsys.readouterr().out
    assert said.count("no --init: published FEAT starts from a trained backbone") == 1
    b = load_file(tmp_path / "scratch" / "model.safetensors")
    assert not any(torch.equal(a[name], b[name]) for name in names if name.endswith("0.weight"))
    with pytest.raises(SystemExit, match="no tensor features"):
        run_here("proto_net", f"{EPISODIC} --init {other} --out {tmp_path / 'c'}")


@pytest.mark.parametrize("recipe", DETECTORS)
def test_detector_end_to_end(recipe, finished):
    base, tuned = finished(recipe) / "base", finished(recipe) / "2shot-seed0"
    assert set(metrics(base)["AP50"]) == {"base", "all"}
    result = metrics(tuned)
    assert set(result["AP50"]) == {"base", "novel", "all"} and len(result["per_class"]) > 10
    left = {"args.json", "log.jsonl", "curves.png", "model.safetensors", "last"}
    left |= {"detections.png", "detections.json"}
    for folder in (base, tuned):
        assert left <= {p.name for p in folder.iterdir()}
    shots = json.loads((tuned / "shots.json").read_text())
    assert sum(len(picture["boxes"]) for picture in shots["pictures"]) == 2 * 20

    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    if "known" in after:
        assert after["known"].all() and len(after["known"]) == 20
    for name, tensor in before.items():
        if name.startswith(FROZEN[recipe]):
            assert torch.equal(tensor, after[name]), f"{name} moved in fine-tuning"
    learnt = [n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])]
    assert learnt, "nothing learnt"


def test_a_base_model_serves_many_fine_tunings(finished, tmp_path):
    run = shutil.copytree(finished("meta_rcnn"), tmp_path / "run")
    stamp = (run / "base" / "model.safetensors").stat().st_mtime_ns
    flags = f"{FEW['meta_rcnn']} --out {run}"
    run_here("meta_rcnn", f"{flags} --seed 1")
    assert (run / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert (run / "1shot-seed1" / "metrics.json").exists()
    for more, words in (
        ("--stage finetune --split 2", "was trained on glyph-10, which is novel here"),
        ("--seed 2 --split 2", "split=1, not 2"),
        ("--seed 2 --short 100", "short=None, not 100"),
    ):
        with pytest.raises(SystemExit, match=words):
            run_here("meta_rcnn", f"{flags} {more}")


def test_novel_classes_can_start_from_a_model_of_their_own(finished, tmp_path):
    """TFA's other initialisation: a model that learnt the novel classes alone lends its last
    layers' rows.
    """
    run = shutil.copytree(finished("tfa novel"), tmp_path / "run")
    novel = run / "2shot-seed0-novel" / "model.safetensors"
    flags = f"{FEW['tfa']} --shots 2 --lr 0"
    run_here("tfa", f"{flags} --stage finetune --novel {novel} --out {run}")
    given, grown = load_file(novel), load_file(run / "2shot-seed0" / "model.safetensors")
    assert torch.equal(grown["reg.weight"][15 * 4 :], given["reg.weight"])
    direction = torch.nn.functional.normalize
    assert torch.allclose(
        direction(grown["cls.weight"][15:20]), direction(given["cls.weight"][:5]), atol=1e-5
    )


def test_attention_rpn_can_start_from_another_detectors_trunk(finished, other, tmp_path):
    model = finished("meta_rcnn") / "base" / "model.safetensors"
    flags = f"{FEW['attention_rpn']} --stage base --lr 0 --iters 1 --save-every 1"
    run_here("attention_rpn", f"{flags} --init {model} --out {tmp_path / 'b'}")
    a, b = load_file(model), load_file(tmp_path / "b" / "base" / "model.safetensors")
    names = [name for name in b if name.startswith(("trunk.layer", "trunk.conv1"))]
    assert len(names) > 20 and all(torch.equal(a[name], b[name]) for name in names)
    assert torch.equal(a["trunk.stage4.0.0.conv1.weight"], b["trunk.stage4.0.conv1.weight"])
    with pytest.raises(SystemExit, match="has no tensor trunk"):
        run_here("attention_rpn", f"{flags} --init {other} --out {tmp_path / 'c'}")


def test_shared_proposals_are_a_way_to_test(finished, tmp_path):
    run = shutil.copytree(finished("attention_rpn"), tmp_path / "run")
    flags = f"--stage base --test-images 1 --test-only --share-proposals --out {run}"
    run_here("attention_rpn", flags)
    (shared,) = results_of_tests(run / "base")
    assert shared["protocol"]["proposals"] == "shared by all classes"
    assert metrics(run / "base")["protocol"]["proposals"] == "of each class"


@pytest.mark.parametrize(
    "recipe", some(["attention_rpn", "meta_rcnn", "fsdetview", "vfa"], {"attention_rpn"})
)
def test_supports_can_be_exchanged_in_a_test(recipe, finished, tmp_path, capsys):
    run = shutil.copytree(finished(recipe), tmp_path / "run")
    flags = f"--stage base --test-images 2 --test-only --scramble-supports --out {run}"
    run_here(recipe, flags)
    assert "with every class given the next class's supports" in capsys.readouterr().out
    (result,) = results_of_tests(run / "base")
    assert set(result["scrambled_supports"]["AP50"]) == set(result["AP50"])


@pytest.mark.parametrize("recipe", some(DETECTORS, {"tfa"}))
def test_testing_changes_nothing(recipe, finished, tmp_path, monkeypatch):
    """--test-only builds the model from its file alone, and leaves every file of the training as it
    is.
    """
    run = shutil.copytree(finished(recipe), tmp_path / "run")
    before = files(run)
    monkeypatch.setattr(torch.optim.SGD, "step", None)  # whoever trains now fails
    (run / "base").rename(tmp_path / "elsewhere")
    run_here(recipe, f"{flags_of_test(recipe)} --out {run}")
    (tmp_path / "elsewhere").rename(run / "base")
    assert files(run) == before

    (again,) = results_of_tests(run / "2shot-seed0")
    settings = again.pop("settings")
    assert again == result_of(run / "2shot-seed0")
    assert settings["tested"]["test_images"] == 5 and settings["method"] == recipe
    for flags, words in (
        ("--shots 1", "no such model file"),
        ("--shots 2 --batch-size 7", "was made with batch_size=2, not 7: leave that flag out"),
    ):
        with pytest.raises(SystemExit, match=words):
            run_here(recipe, f"{flags} --out {run} --test-only")


def test_wandb_logs_offline_a_run_for_each_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_here("meta_rcnn", f"{FEW['meta_rcnn']} --out {tmp_path} --wandb")
    ids = set()
    for stage in ("base", "1shot-seed0"):
        (log,) = tmp_path.glob(f"{stage}/wandb/offline-run-*/*.wandb")
        ids.add(log.stem)
        for picture in ("detections", "confusion", *(["shots"] if "shot" in stage else [])):
            images = f"{stage}/wandb/offline-run-*/files/media/images/{picture}_*.png"
            assert list(tmp_path.glob(images))
        assert log.stem == f"run-{metrics(tmp_path / stage)['settings']['id']}"
    assert len(ids) == 2


# processes of their own; those that share a training are in tests/test_same.py, more that are
# killed in tests/test_faults.py
CPU = f"--config_file {ROOT / 'accelerate_configs' / 'cpu.yaml'}"


def test_bf16_under_accelerate_launch(tmp_path):
    """With workers; and what is wrong is one line, the last."""
    jobs = [
        [recipe, f"{FEW[recipe]} --workers 1 --out {tmp_path / recipe}"]
        for recipe in ("proto_net", "meta_rcnn")
    ]
    jobs.append(["proto_net", f"--dataset omniglot --data-root {tmp_path}"])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch(
        Path(several.__file__),
        str(tmp_path / "jobs.json"),
        launcher=f"{CPU} --mixed_precision bf16 --quiet",
    )
    for folder in ("proto_net", "meta_rcnn/base", "meta_rcnn/1shot-seed0"):
        assert (tmp_path / folder / "metrics.json").exists(), done.stderr[-3000:]
        assert metrics(tmp_path / folder)["settings"]["run"]["precision"] == "bf16"

    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "images_background" in lines[0] and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_in_bf16(recipe, tmp_path):
    flags = f"{QUICK[recipe]} --out {tmp_path} --workers 1"
    done = launch(recipe, flags, launcher=f"{CPU} --mixed_precision bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.rglob("metrics.json"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(recipe, backend, tmp_path):
    stage = "--stage base --iters 3" if recipe in DETECTORS else "--iters 4"
    flags = f"{QUICK[recipe]} {stage} --out {tmp_path} --workers 0"
    done = launch(recipe, flags, launcher=f"--dynamo_backend {backend}")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "base" if recipe in DETECTORS else tmp_path
    assert not any("_orig_mod" in name for name in load_file(folder / "model.safetensors"))


KILLS = [(recipe, "last/record.json") for recipe in CLASSIFIERS]
KILLS += [(recipe, "base/last/record.json") for recipe in DETECTORS]
KILLS += [
    (recipe, moment)
    for recipe in ("meta_rcnn", "tfa", "attention_rpn")
    for moment in ("base/metrics.json", "1shot-seed0/last/record.json")
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "moment"), KILLS)
def test_killed_run_resumes_to_the_same_weights(recipe, moment, tmp_path):
    """Killed as soon as a file is there: --resume ends with the weights of a straight run."""
    flags = f"{QUICK[recipe]} --iters 12"
    flags += " --save-every 2 --test-images 2" if recipe in DETECTORS else ""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_here(recipe, f"{flags} --out {straight}")
    killed(recipe, flags, broken, broken / moment)
    last = broken / "1shot-seed0" if recipe in DETECTORS else broken
    assert not (last / "metrics.json").exists()
    run_here(recipe, f"{flags} --out {broken} --resume")
    assert not differences(straight, broken)


@pytest.mark.parametrize(
    ("recipe", "number"),
    some(
        [(r, n) for r in ("meta_rcnn", "proto_net") for n in (signal.SIGTERM, signal.SIGINT)],
        {("proto_net", signal.SIGINT)},
    ),
)
def test_a_signal_saves_the_state(recipe, number, tmp_path):
    """With workers, which must not die of a Ctrl-C that reaches them too."""
    stage = "base" if recipe in DETECTORS else ""
    flags = f"{QUICK[recipe]} {stage and '--stage base'} --iters 400 --workers 1"
    record = tmp_path / stage / "last" / "record.json"
    status, said = killed(recipe, flags, tmp_path, record, number)
    assert status == 128 + number and "Traceback" not in said, said[-3000:]
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"interrupted: step {json.loads(record.read_text())['step']} of")
    assert "--resume goes on" in last


@pytest.mark.parametrize("config", ["cpu", "one_gpu", "multi_gpu", "multi_node"])
def test_accelerate_configs_load(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(ROOT / "accelerate_configs" / f"{config}.yaml"))
    assert loaded.mixed_precision == ("no" if config == "cpu" else "bf16")
    assert (
        loaded.num_processes == {"cpu": 1, "one_gpu": 1, "multi_gpu": 8, "multi_node": 16}[config]
    )
