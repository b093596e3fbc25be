"""Methods that train nothing: a backbone as it is, every picture's features once, and their mean
over base classes.

Features are kept in files whose names follow from what they were made by and of: weights, pictures,
size, normalisation and precision. All methods and settings on one backbone share a single pass, and
nothing stale is ever taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewshot import InputError, weights
from fewshot.backbones import networks
from fewshot.backbones.networks import Backbone
from fewshot.data import episodes
from fewshot.data.cache import Squares, alone, unfinished
from fewshot.data.classification import open_domain, open_splits
from fewshot.data.image_set import ImageSet
from fewshot.data.transforms import Normalisation
from fewshot.evaluation.meta_test import FewShotModel, extract
from fewshot.training import folders
from fewshot.training.folders import Stage


def find_stage(accelerator: Accelerator, method: str, args: Any) -> Stage | None:
    """What is to be done in `--out`, by default `default_folder`: `folders.due`.

    Raises:
        InputError: not one of `--init` and `--backbone` is given; or as `due`.
    """
    if not args.test_only and (args.init is None) == (args.backbone is None):
        raise InputError(
            "give a trained model, say --init runs/baseline/glyphs-conv4-seed0, or else a pretrained network, say "
            "--backbone torchvision/resnet18"
        )
    folder = args.out or default_folder(method, args)
    return folders.due(accelerator, method, Stage("learn", replace(args, out=folder), folder))


def default_folder(method: str, args: Any) -> str:
    """runs/METHOD/DATASET-BACKBONE-..., the backbone being a network or a trained run."""
    start = args.backbone
    if args.init:
        path = Path(args.init)
        start = "-".join((path.parent if path.suffix == ".safetensors" else path).parts[-2:])
    novel, test = (value and Path(value).stem for value in (args.novel, args.test_dataset))
    unequal = None if args.imbalance is None else f"imbalance{args.imbalance:g}"
    return folders.default(
        method, args.dataset, novel, start, test and f"on-{test}", unequal, f"seed{args.seed}"
    )


class Opened(NamedTuple):
    """A frozen backbone, and pictures as it wants them: of the base classes, and those that test."""

    backbone: Backbone
    base_set: ImageSet
    test_set: ImageSet
    about: dict[str, Any]  # what the model's file is to say of them


def opened(accelerator: Accelerator, stage: Stage) -> Opened:
    """What `--init`, or `--backbone` with `--weights` and `--size`, and the flags of the data ask
    for; of a test what the model's file says.

    Raises:
        InputError: as `networks.of`, `open_dataset` and `episodes.check` do.
    """
    args, trained = stage.args, stage.metadata
    source = args.init
    if trained is not None:
        source = args.out
    elif source:
        trained = weights.describe_file(source)

    if trained is None:
        name, pictures = args.backbone, networks.inputs(args)
    else:
        name = trained.get("backbone") or trained["args"]["backbone"]
        normalisation = Normalisation.from_dict(trained["normalisation"])
        pictures = {"size": trained["size"], "normalisation": normalisation}
        learnt_on = trained.get("dataset", "folder")
        if learnt_on not in (args.dataset, "folder"):
            accelerator.print(f"{source} was trained on {learnt_on}, and is used on {args.dataset}")

    with accelerator.local_main_process_first():  # one process fills the cache
        base_set, _, test_set = open_splits(
            args.dataset, args.data_root, args.novel, cache=args.cache, **pictures
        )
        if args.test_dataset:
            root = args.test_root or args.data_root
            test_set = open_domain(args.test_dataset, root, base_set, cache=args.cache)

    sizes = (args.ways, max(args.shots), args.queries)
    episodes.check(test_set, *sizes)
    if args.imbalance is not None:
        episodes.check_imbalanced(test_set, *sizes, args.imbalance)
    accelerator.print(
        f"{test_set.origin}: {len(test_set)} pictures of {len(test_set.classes)} classes to test on"
    )

    if source:
        backbone = networks.build(name, base_set.size)
        weights.fill_part(backbone, source, "features.")
    else:
        backbone = networks.of(args, base_set.size)
    backbone.freeze()
    return Opened(backbone, base_set, test_set, base_set.describe() | {"backbone": name})


def features(accelerator: Accelerator, model: FewShotModel, dataset: ImageSet, args: Any) -> Tensor:
    """Features (n, D) of all pictures of a data set, float32, on every process's device.

    They come from the file in `--features` that has just these, which is made if there is none.

    Raises:
        InputError: the file is damaged, the folder cannot be written to, or a picture cannot be
            read.
    """
    return _kept(accelerator, model, dataset, args, "features", lambda x: x)


def base_mean(
    accelerator: Accelerator, model: FewShotModel, dataset: ImageSet, args: Any
) -> Tensor:
    """Mean (D,) of the features of all pictures of the base classes; kept, and raising, as
    `features`.
    """
    return _kept(accelerator, model, dataset, args, "mean", lambda x: x.double().mean(0).float())


def _kept(
    accelerator: Accelerator,
    model: FewShotModel,
    dataset: ImageSet,
    args: Any,
    what: str,
    reduced: Callable[[Tensor], Tensor],
) -> Tensor:
    model = model.to(accelerator.device).eval()
    key = _key(accelerator, model.features, dataset)
    path = Path(args.features) / f"{dataset.name}-{dataset.split}-{key}-{what}.safetensors"
    accelerator.wait_for_everyone()  # all look before one writes
    if path.exists():
        return _read(path, what, len(dataset)).to(accelerator.device)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # several processes wait for each other, and would for too long if one waited for another
        # run: they make the file a second time
        turn = alone(path) if accelerator.num_processes == 1 else nullcontext()
        with turn:
            if path.exists():  # another run has made it
                return _read(path, what, len(dataset)).to(accelerator.device)
            indices = np.arange(len(dataset))
            made = reduced(extract(accelerator, model, dataset, indices, args.workers))
            if accelerator.is_main_process:
                own = unfinished(path)
                save_file({what: made.cpu().contiguous()}, own)
                os.replace(own, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path.parent}: features cannot be kept here ({error}): give another --features"
        ) from error
    accelerator.wait_for_everyone()
    return made


def _read(path: Path, what: str, number: int) -> Tensor:
    """The features of so many pictures, or their mean. Raises InputError if the file is damaged."""
    try:
        kept = load_file(path)[what]
        shape = (number, kept.shape[-1]) if what == "features" else kept.shape[-1:]
        if kept.dtype != torch.float32 or kept.shape != shape or not kept.isfinite().all():
            raise ValueError(
                f"{what} of {number} pictures is {tuple(kept.shape)} of {kept.dtype}, or not finite"
            )
        return kept
    except (SafetensorError, LookupError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and it is made again") from error


def _key(accelerator: Accelerator, backbone: nn.Module, dataset: ImageSet) -> str:
    """Says by what and of what features were made."""
    made_by = hashlib.sha256(repr(backbone).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        made_by.update(name.encode())
        if tensor.ndim:
            made_by.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    source = dataset.source
    # the name of a cache ends in a digest of the pictures' version
    version = source.path.name if isinstance(source, Squares) else source.version()
    if version is None:  # they are in memory
        version = hashlib.sha256(pickle.dumps(source)).hexdigest()
    made_of = json.dumps(dataset.describe() | {"split": dataset.split}, sort_keys=True)
    made_by.update(f"{made_of}{version!r} {accelerator.mixed_precision}".encode())
    return made_by.hexdigest()[:16]
