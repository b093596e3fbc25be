"""The recipes as users run them: end to end on the embedded data, resumed, killed, in two
processes, in bf16.
"""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
import torch
from runs import (
    CLASSIFIERS,
    DETECTORS,
    DIFFERENT,
    EPISODIC,
    EVERY,
    FROZEN,
    MOMENTS,
    PROTOTYPES,
    QUICK,
    RECIPES,
    ROOT,
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

# lines beyond the others' bound, for published tables: of each split and shots, of two settings, of
# two stages' batches
TABLES = {"fsce": 12, "defrcn": 14, "mpsr": 10, "attention_rpn": 22}


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
    assert len(source.splitlines()) <= most + TABLES.get(recipe, 0)
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


# of pmf, whose published fine-tuning this tests, tests/test_pmf.py has a quicker one
@pytest.mark.parametrize("recipe", some(CLASSIFIERS, set(CLASSIFIERS) - {"pmf"}))
def test_classifier_end_to_end(recipe, tmp_path):
    run_here(recipe, f"{QUICK[recipe]} --out {tmp_path}")
    result = metrics(tmp_path)
    assert result["ways"] == 5 and result["tasks"] in (4, 10) and set(result["shots"]) == {"1", "5"}
    for shots in result["shots"].values():
        assert (
            15 <= shots["accuracy"] <= 100 and shots["ci95"] >= 0
        )  # chance is 20, and few steps were taken
    before = files(tmp_path)
    run_here(
        recipe, f"--tasks {result['tasks']} --out {tmp_path} --test-only --save-tasks"
    )  # the model's file says the rest
    assert files(tmp_path) == before
    (again,) = results_of_tests(tmp_path)
    assert {key: again[key] for key in ("ways", "tasks", "shots")} == {
        k: result[k] for k in ("ways", "tasks", "shots")
    }
    tasks = json.loads(next(tmp_path.glob("test-*-tasks.json")).read_text())
    mean = sum(tasks["5"]) / len(tasks["5"])
    assert mean == pytest.approx(result["shots"]["5"]["accuracy"], abs=1e-3)


def test_the_documentations_own_recipe_runs(tmp_path):
    """README, "Your own recipe": copy, change ten lines, run, from any folder."""
    (block,) = [block for block in python_blocks() if "class Cosine" in block]
    source = (ROOT / "recipes" / "proto_net.py").read_text()
    built = "FewShotClassifier(backbone, Cosine())"
    assert built in (ROOT / "README.md").read_text()
    source = re.sub(r"FewShotClassifier\(backbone, .*", built, source)
    imports = "from torch import Tensor, nn\n\n\n"
    source = source.replace("def main(", f"{imports}{block}\n\ndef main(", 1)
    (tmp_path / "my_method.py").write_text(source)
    source = source.replace('METHOD = "proto_net"', 'METHOD = "my_method"')
    (tmp_path / "my_method.py").write_text(source)
    command = [sys.executable, str(tmp_path / "my_method.py"), *EPISODIC.split(), "--workers", "0"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / "runs" / "my_method" / "glyphs-conv4-seed0"
    assert "head.log_temperature" in load_file(folder / "model.safetensors")
    assert weights.describe_file(folder / "model.safetensors")["method"] == "my_method"


def test_the_documentations_own_detector_runs(tmp_path, monkeypatch):
    """README, "Your own recipe": a detector that aggregates in another way, trained, tested as
    trained, and loaded.
    """
    (block,) = [block for block in python_blocks() if "class MyDetector" in block]
    (use,) = [block for block in python_blocks() if "rebuilt(MyDetector" in block]
    source = (
        (ROOT / "recipes" / "meta_rcnn.py")
        .read_text()
        .replace('METHOD = "meta_rcnn"', 'METHOD = "my_detector"')
    )
    tables, functions = source.split("def main(")
    tables = tables.replace("import MetaRCNN", "import MetaDetector")
    functions = functions.replace("MetaRCNN", "MyDetector")
    changed = f"{tables}from torch import Tensor\n\n{block}\n\ndef main({functions}"
    (tmp_path / "my_detector.py").write_text(changed)
    command = [
        sys.executable,
        str(tmp_path / "my_detector.py"),
        *QUICK["meta_rcnn"].split(),
        "--workers",
        "0",
    ]
    done = subprocess.run([*command, "--shots", "10"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    names = {
        "MetaDetector": importlib.import_module("fewshot.detectors.meta_rcnn").MetaDetector,
        "Tensor": torch.Tensor,
    }
    exec(block + use, names)
    assert (
        type(names["model"].network).__name__ == "MyDetector"
        and names["model"].about["method"] == "my_detector"
    )


def test_the_documentations_use_of_models_runs(tmp_path, monkeypatch):
    """README, "Use a model", as written, on models that its commands leave behind, here after a few
    steps.
    """
    monkeypatch.chdir(tmp_path)
    run_here("meta_rcnn", QUICK["meta_rcnn"].replace("--shots 1", "--shots 10"))
    run_here("attention_rpn", f"{QUICK['attention_rpn']} --stage base")
    blocks = [block for block in python_blocks() if "fewshot.load" in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "found.png").exists() and (tmp_path / "never_trained.png").exists()


def test_a_trained_backbone_can_be_taken_over(tmp_path, capsys):
    run_here("baseline", f"{QUICK['baseline']} --out {tmp_path / 'a'}")
    model = tmp_path / "a" / "model.safetensors"
    for recipe, init in (("meta_baseline", model), ("feat", model.parent), ("frn", model.parent)):
        run_here(recipe, f"{EPISODIC} --lr 0 --init {init} --out {tmp_path / recipe}")
        a, b = load_file(model), load_file(tmp_path / recipe / "model.safetensors")
        names = [
            name for name in a if name.startswith("features.") and name.endswith(("weight", "bias"))
        ]
        assert len(names) == 16 and all(torch.equal(a[name], b[name]) for name in names)
    assert "no --init" not in capsys.readouterr().out
    run_here("feat", f"{EPISODIC} --out {tmp_path / 'scratch'}")
    assert (
        capsys.readouterr().out.count("no --init: published FEAT starts from a trained backbone")
        == 1
    )
    scratch = load_file(tmp_path / "scratch" / "model.safetensors")
    assert not any(
        torch.equal(a[name], scratch[name]) for name in names if name.endswith("0.weight")
    )
    weights.save(tmp_path / "other.safetensors", torch.nn.Linear(2, 2), {})
    with pytest.raises(SystemExit, match="no tensor features"):
        run_here(
            "proto_net",
            f"{EPISODIC} --init {tmp_path / 'other.safetensors'} --out {tmp_path / 'c'}",
        )


@pytest.mark.parametrize("recipe", DETECTORS)
def test_detector_end_to_end(recipe, tmp_path):
    run_here(recipe, f"{QUICK[recipe]} --out {tmp_path}")
    base, tuned = tmp_path / "base", tmp_path / "1shot-seed0"
    assert set(metrics(base)["AP50"]) == {"base", "all"}
    result = metrics(tuned)
    assert set(result["AP50"]) == {"base", "novel", "all"} and len(result["per_class"]) > 10
    files = {
        "args.json",
        "log.jsonl",
        "curves.png",
        "model.safetensors",
        "last",
        "detections.png",
        "detections.json",
    }
    for folder in (base, tuned):
        assert files <= {p.name for p in folder.iterdir()}
    shots = json.loads((tuned / "shots.json").read_text())
    assert sum(len(picture["boxes"]) for picture in shots["pictures"]) == 20
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    if "known" in after:
        assert after["known"].all() and len(after["known"]) == 20
    for name, tensor in before.items():
        if name.startswith(FROZEN[recipe]):
            assert torch.equal(tensor, after[name]), f"{name} moved in fine-tuning"
    assert any(
        not torch.equal(before[name], after[name]) for name in before.keys() & after.keys()
    ), "nothing learnt"


def test_a_base_model_serves_many_fine_tunings(tmp_path):
    run_here("meta_rcnn", f"{QUICK['meta_rcnn']} --stage base --out {tmp_path}")
    stamp = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    run_here("meta_rcnn", f"{QUICK['meta_rcnn']} --out {tmp_path} --seed 1")
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert (tmp_path / "1shot-seed1" / "metrics.json").exists()
    with pytest.raises(SystemExit, match="was trained on glyph-10, which is novel here"):
        run_here("meta_rcnn", f"{QUICK['meta_rcnn']} --out {tmp_path} --stage finetune --split 2")
    for flags, words in (("--split 2", "split=1, not 2"), ("--short 100", "short=None, not 100")):
        with pytest.raises(SystemExit, match=words):
            run_here("meta_rcnn", f"{QUICK['meta_rcnn']} --out {tmp_path} --seed 2 {flags}")


def test_novel_classes_can_start_from_a_model_of_their_own(tmp_path):
    """TFA's other initialisation: a model that learnt the novel classes alone lends its last
    layers' rows.
    """
    flags = f"{QUICK['tfa']} --out {tmp_path}"
    run_here("tfa", f"{flags} --stage base")
    run_here("tfa", f"{flags} --stage novel")
    novel = tmp_path / "1shot-seed0-novel" / "model.safetensors"
    run_here("tfa", f"{flags} --stage finetune --novel {novel} --lr 0")
    given, grown = load_file(novel), load_file(tmp_path / "1shot-seed0" / "model.safetensors")
    assert torch.equal(grown["reg.weight"][15 * 4 :], given["reg.weight"])
    direction = torch.nn.functional.normalize
    assert torch.allclose(
        direction(grown["cls.weight"][15:20]), direction(given["cls.weight"][:5]), atol=1e-5
    )


def test_attention_rpn_can_start_from_another_detectors_trunk(tmp_path):
    run_here("meta_rcnn", f"{QUICK['meta_rcnn']} --stage base --out {tmp_path / 'a'}")
    model = tmp_path / "a" / "base" / "model.safetensors"
    run_here(
        "attention_rpn",
        f"{QUICK['attention_rpn']} --stage base --lr 0 --init {model} --out {tmp_path / 'b'}",
    )
    a, b = load_file(model), load_file(tmp_path / "b" / "base" / "model.safetensors")
    names = [name for name in b if name.startswith(("trunk.layer", "trunk.conv1"))]
    assert len(names) > 20 and all(torch.equal(a[name], b[name]) for name in names)
    assert torch.equal(a["trunk.stage4.0.0.conv1.weight"], b["trunk.stage4.0.conv1.weight"])
    with pytest.raises(SystemExit, match="has no tensor trunk"):
        weights.save(tmp_path / "other.safetensors", torch.nn.Linear(2, 2), {})
        run_here(
            "attention_rpn",
            f"{QUICK['attention_rpn']} --init {tmp_path / 'other.safetensors'} --out {tmp_path / 'c'}",
        )


def test_shared_proposals_are_a_way_to_test(tmp_path):
    run_here("attention_rpn", f"{QUICK['attention_rpn']} --stage base --out {tmp_path}")
    assert metrics(tmp_path / "base")["protocol"]["proposals"] == "of each class"
    run_here(
        "attention_rpn",
        f"{QUICK['attention_rpn']} --stage base --out {tmp_path} --test-only --share-proposals",
    )
    (shared,) = results_of_tests(tmp_path / "base")
    assert shared["protocol"]["proposals"] == "shared by all classes"
    assert metrics(tmp_path / "base")["protocol"]["proposals"] == "of each class"


@pytest.mark.parametrize("recipe", some(RECIPES, DIFFERENT))
def test_killed_run_resumes_to_the_same_weights(recipe, tmp_path):
    stage, run_of = ("--stage base", "base") if recipe in DETECTORS else ("", "")
    flags = f"{QUICK[recipe]} {stage} --iters 12"
    run_here(recipe, f"{flags} --out {tmp_path / 'straight'}")
    command = [
        sys.executable,
        str(ROOT / "recipes" / f"{recipe}.py"),
        *flags.split(),
        "--out",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    saved = tmp_path / "killed" / run_of / "last" / "record.json"
    deadline = time.time() + 120
    while not saved.exists() and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert saved.exists()
    run_here(recipe, f"{flags} --out {tmp_path / 'killed'} --resume")
    a, b = (load_file(tmp_path / x / run_of / "model.safetensors") for x in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert result_of(tmp_path / "straight" / run_of) == result_of(tmp_path / "killed" / run_of)


@pytest.mark.parametrize("recipe", some(RECIPES, DIFFERENT))
def test_two_processes_test_to_the_same_numbers(recipe, tmp_path):
    run_here(recipe, f"{QUICK[recipe]} --out {tmp_path}")
    tested = "--test-images 12" if recipe in DETECTORS else f"--tasks {metrics(tmp_path)['tasks']}"
    (folder,) = [tmp_path / "1shot-seed0"] if recipe in DETECTORS else [tmp_path]
    shots = "--shots 1" if recipe in DETECTORS else ""
    done = launch(recipe, f"{shots} {tested} --out {tmp_path} --test-only --workers 0", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    (again,) = results_of_tests(folder)
    assert {k: again[k] for k in again if k != "settings"} == result_of(folder)


@pytest.mark.parametrize(
    ("recipe", "processes"),
    some([(r, n) for r in DETECTORS for n in (2, 3)], {("meta_rcnn", 2), ("tfa", 2)}),
)
def test_both_stages_in_several_processes(recipe, processes, tmp_path):
    flags = f"{QUICK[recipe]} --iters 3 --batch-size {processes} --test-images 4 --out {tmp_path} --workers 0"
    done = launch(recipe, flags, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "base") and metrics(tmp_path / "1shot-seed0")
    again = launch(recipe, flags, processes=processes)  # the same command again shows what is there
    assert again.returncode == 0 and again.stdout.count("is finished") == 2, again.stderr[-3000:]


@pytest.mark.parametrize("recipe", some(RECIPES, DIFFERENT))
def test_bf16_under_accelerate_launch(recipe, tmp_path):
    flags = f"{QUICK[recipe]} --out {tmp_path} --workers 1"
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    done = launch(recipe, flags, launcher=f"--config_file {config} --mixed_precision bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.rglob("metrics.json"))


def test_wandb_logs_offline_a_run_for_each_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_here("meta_rcnn", f"{QUICK['meta_rcnn']} --out {tmp_path} --wandb")
    ids = set()
    for stage in ("base", "1shot-seed0"):
        (log,) = tmp_path.glob(f"{stage}/wandb/offline-run-*/*.wandb")
        ids.add(log.stem)
        for picture in ("detections", "confusion", *(["shots"] if "shot" in stage else [])):
            assert list(
                tmp_path.glob(f"{stage}/wandb/offline-run-*/files/media/images/{picture}_*.png")
            )
        assert log.stem == f"run-{metrics(tmp_path / stage)['settings']['id']}"
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("recipe", "moment"),
    some(
        [(r, m) for r in ("meta_rcnn", "tfa", "attention_rpn") for m in MOMENTS],
        {("meta_rcnn", m) for m in MOMENTS},
    ),
)
def test_both_stages_resume_from_any_moment(recipe, moment, tmp_path):
    """Killed in base training, between the stages, in fine-tuning: --resume ends with the weights
    of a straight run.
    """
    flags = f"{QUICK[recipe]} --iters 12 --save-every 2 --workers 0 --test-images 2"
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_here(recipe, f"{flags} --out {straight}")
    when = {
        "base": "base/last/record.json",
        "between": "base/metrics.json",
        "finetune": "1shot-seed0/last/record.json",
    }
    killed(recipe, flags, broken, broken / when[moment])
    assert not (broken / "1shot-seed0" / "metrics.json").exists()
    run_here(recipe, f"{flags} --out {broken} --resume")
    for stage in ("base", "1shot-seed0"):
        a, b = (load_file(folder / stage / "model.safetensors") for folder in (straight, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert result_of(straight / stage) == result_of(broken / stage)


@pytest.mark.parametrize(
    ("recipe", "number"),
    some(
        [
            (recipe, number)
            for recipe in ("meta_rcnn", "proto_net")
            for number in (signal.SIGTERM, signal.SIGINT)
        ],
        {("meta_rcnn", signal.SIGTERM), ("proto_net", signal.SIGINT)},
    ),
)
def test_a_signal_saves_the_state(recipe, number, tmp_path):
    """With workers, which must not die of a Ctrl-C that reaches them too."""
    stage = "--stage base" if recipe in DETECTORS else ""
    flags, folder = (
        f"{QUICK[recipe]} {stage} --iters 400 --workers 1",
        tmp_path / ("base" if stage else ""),
    )
    status = killed(recipe, flags, tmp_path, folder / "last" / "record.json", number)
    assert status == 128 + number, killed.said[-3000:]
    last = killed.said.replace("\r", "\n").strip().splitlines()[-1]
    assert (
        last.startswith("interrupted: step ")
        and "--resume goes on" in last
        and "Traceback" not in killed.said
    )
    step = json.loads((folder / "last" / "record.json").read_text())["step"]
    assert f"step {step} of" in last


@pytest.mark.parametrize("recipe", some(DETECTORS, {"tfa"}))
def test_testing_changes_nothing(recipe, tmp_path, monkeypatch):
    """--test-only builds the model from its file alone, and leaves every file of the training as it
    is.
    """
    run_here(recipe, f"{QUICK[recipe]} --out {tmp_path}")
    before = files(tmp_path)
    monkeypatch.setattr(torch.optim.SGD, "step", None)  # whoever trains now fails
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    run_here(recipe, f"--shots 1 --test-images 12 --out {tmp_path} --test-only")
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    assert files(tmp_path) == before
    (again,) = results_of_tests(tmp_path / "1shot-seed0")
    assert {k: again[k] for k in again if k != "settings"} == result_of(tmp_path / "1shot-seed0")
    assert (
        again["settings"]["tested"]["test_images"] == 12 and again["settings"]["method"] == recipe
    )
    with pytest.raises(SystemExit, match="no such model file"):
        run_here(recipe, f"--shots 2 --out {tmp_path} --test-only")
    with pytest.raises(SystemExit, match="was made with batch_size=2, not 7: leave that flag out"):
        run_here(recipe, f"--shots 1 --batch-size 7 --out {tmp_path} --test-only")


@pytest.mark.parametrize(
    "recipe", some(["attention_rpn", "meta_rcnn", "fsdetview", "vfa"], {"attention_rpn"})
)
def test_supports_can_be_exchanged_in_a_test(recipe, tmp_path, capsys):
    run_here(recipe, f"{QUICK[recipe]} --stage base --out {tmp_path}")
    run_here(
        recipe, f"--stage base --test-images 4 --test-only --scramble-supports --out {tmp_path}"
    )
    assert "with every class given the next class's supports" in capsys.readouterr().out
    (result,) = results_of_tests(tmp_path / "base")
    assert set(result["scrambled_supports"]["AP50"]) == set(result["AP50"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(recipe, backend, tmp_path):
    stage = "--stage base --iters 3" if recipe in DETECTORS else "--iters 4"
    done = launch(
        recipe,
        f"{QUICK[recipe]} {stage} --out {tmp_path} --workers 0",
        launcher=f"--dynamo_backend {backend}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "base" if recipe in DETECTORS else tmp_path
    assert not any("_orig_mod" in name for name in load_file(folder / "model.safetensors"))


def test_errors_are_one_line(tmp_path):
    done = launch("proto_net", f"--dataset omniglot --data-root {tmp_path}", launcher="--quiet")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "images_background" in lines[0] and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == lines[0]


@pytest.mark.parametrize("config", ["cpu", "one_gpu", "multi_gpu", "multi_node"])
def test_accelerate_configs_load(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(ROOT / "accelerate_configs" / f"{config}.yaml"))
    assert loaded.mixed_precision == ("no" if config == "cpu" else "bf16")
    assert (
        loaded.num_processes == {"cpu": 1, "one_gpu": 1, "multi_gpu": 8, "multi_node": 16}[config]
    )
