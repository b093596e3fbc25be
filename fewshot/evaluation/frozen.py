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
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

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

NOT_KEPT = "{}: features cannot be kept here ({}): give another --features"


def folder(method: str, args: Any) -> str:
    """Where a run goes by default: runs/METHOD/DATASET-BACKBONE-..., the backbone being a network
    or a trained run.
    """
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


def opened(accelerator: Accelerator, args: Any) -> Opened:
    """What `--init`, or `--backbone` with `--weights` and `--size`, and the flags of the data ask
    for.

    Raises:
        InputError: not one of these two flags is given; or as `networks.of`, `open_dataset` and
            `episodes.check` do.
    """
    if not args.test_only and (args.init is None) == (args.backbone is None):
        raise InputError(
            "give a trained model, say --init runs/baseline/glyphs-conv4-seed0, or else a pretrained network, say "
            "--backbone torchvision/resnet18"
        )
    source = args.out if args.test_only else args.init
    if source:
        trained = weights.describe_file(source)
        name = trained.get("backbone") or trained["args"]["backbone"]
        pictures = {
            "size": trained["size"],
            "normalisation": Normalisation.from_dict(trained["normalisation"]),
        }
    else:
        trained, name, pictures = {}, args.backbone, networks.inputs(args)
    if trained.get("dataset", args.dataset) not in (args.dataset, "folder"):
        accelerator.print(
            f"{source} was trained on {trained['dataset']}, and is used on {args.dataset}"
        )
    with accelerator.local_main_process_first():  # one process fills the cache
        base_set, _, test_set = open_splits(
            args.dataset, args.data_root, args.novel, cache=args.cache, **pictures
        )
        if args.test_dataset:
            root = args.test_root or args.data_root
            test_set = open_domain(args.test_dataset, root, base_set, cache=args.cache)
    episodes.check(test_set, args.ways, max(args.shots), args.queries)
    if args.imbalance is not None:
        episodes.check_imbalanced(
            test_set, args.ways, max(args.shots), args.queries, args.imbalance
        )
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
    path = (
        Path(args.features)
        / f"{dataset.name}-{dataset.split}-{_key(accelerator, model.features, dataset)}-{what}"
    )
    path = path.with_name(path.name + ".safetensors")
    accelerator.wait_for_everyone()  # all look before one writes
    with ExitStack() as turn:
        # of several processes one would wait for another run, and the others, for too long, for
        # that one
        if accelerator.num_processes == 1 and not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                turn.enter_context(alone(path))
            except OSError as error:
                raise InputError(NOT_KEPT.format(path.parent, error)) from error
        if not path.exists():
            made = reduced(
                extract(
                    accelerator, model, dataset, torch.arange(len(dataset)).numpy(), args.workers
                )
            )
            if accelerator.is_main_process:
                _write(path, what, made)
            accelerator.wait_for_everyone()
            return made
    try:
        kept = load_file(path)[what]
        if (
            kept.dtype != torch.float32
            or kept.ndim != (1 if what == "mean" else 2)
            or not kept.isfinite().all()
        ):
            raise ValueError(
                f"{what} is {tuple(kept.shape)} of {kept.dtype}, or has numbers that are not finite"
            )
        if what == "features" and len(kept) != len(dataset):
            raise ValueError(f"it has features of {len(kept)} pictures, not of {len(dataset)}")
        return kept.to(accelerator.device)
    except (SafetensorError, LookupError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and it is made again") from error


def _write(path: Path, what: str, made: Tensor) -> None:
    own = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({what: made.cpu().contiguous()}, own)
        os.replace(own, path)
    except (OSError, SafetensorError) as error:
        raise InputError(NOT_KEPT.format(path.parent, error)) from error
    finally:
        own.unlink(missing_ok=True)


def _key(accelerator: Accelerator, backbone: nn.Module, dataset: ImageSet) -> str:
    """Says by what and of what features were made."""
    made_by = hashlib.sha256(repr(backbone).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        made_by.update(name.encode())
        made_by.update(
            tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
        )
    source = dataset.source
    if isinstance(source, Squares):
        version: object = source.path.name  # ends in a digest of the pictures' version
    elif (version := source.version()) is None:  # they are in memory
        version = hashlib.sha256(pickle.dumps(source)).hexdigest()
    made_of = json.dumps(dataset.describe() | {"split": dataset.split}, sort_keys=True) + repr(
        version
    )
    made_by.update(f"{made_of} {accelerator.mixed_precision}".encode())
    return made_by.hexdigest()[:16]
