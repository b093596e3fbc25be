"""Models in and out: one self-describing safetensors file each."""

import hashlib
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fewshot import InputError

Shapes = Mapping[str, Sequence[int]]  # of a file's tensors, by name
ADVICE = "give the model.safetensors of a run, or of one of scripts/convert_*.py"
FILE = "model.safetensors"  # of a run's folder, and on the hub
FORMAT = 1  # of the metadata; a reader refuses newer ones
# fields that every reader relies on where a file has them, and what they are
KINDS = {"method": str, "classes": list, "base": list, "novel": list}
KINDS |= {"args": dict, "architecture": dict, "sizes": dict, "normalisation": dict}
KINDS |= {"pictures": dict, "results": dict, "calibration": dict}


class Metadata(dict):
    """What a model's file says of itself. To ask for a field that it lacks is an `InputError`.

    Attributes:
        source: the file.
        shapes: of its tensors; only the outermost object has them.
    """

    source: str
    shapes: Shapes

    def __missing__(self, key: str) -> Any:
        raise InputError(
            f"{self.source}: a model's file that does not say its {key!r}: save it anew"
        )


def save(path: str | Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write `model`'s parameters and buffers with `metadata` (json values), atomically.

    The file also names the format and the git commit of the code, so that the model can be rebuilt
    from it alone.
    """
    save_state(path, model.state_dict(), {"commit": commit(), **metadata})


def save_state(path: str | Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """`save` of a state dict; the metadata say which commit made it."""
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    stores: set[int] = set()
    for name, t in state.items():
        t = t.detach().cpu().contiguous()
        store = t.untyped_storage().data_ptr()
        # safetensors refuses those that share memory
        tensors[name] = t.clone() if store in stores else t
        stores.add(store)
    about = {**metadata, "fewshot_format": FORMAT}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, {key: json.dumps(value) for key, value in about.items()})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error}): make room on the disk, or give another folder"
        ) from None


def find(source: str | Path) -> Path:
    """The model file that `source` means: a file, a folder that holds one, or a hub id, which is
    downloaded.

    An id is two words and a slash. What looks like a path is never asked of the hub: what ends in
    .safetensors, begins with a dot, a slash, ~ or runs/, or would lie in a folder that is there.

    Raises:
        InputError: there is none; of an id that cannot be had it says why.
    """
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise InputError(f"{path} holds no {FILE}: {_instead(path)}")
        return path / FILE
    if path.exists():
        return path
    local = (
        text.startswith((".", "/", "~", "runs/"))
        or path.suffix == ".safetensors"
        or path.parent.exists()
    )
    if local or text.count("/") != 1:
        raise InputError(
            f"{path}: no such model file or folder; give a run's folder, its {FILE}, or a hub id, user/model"
        )
    return download(text)


def _instead(folder: Path) -> str:
    """What to load where a folder has no model."""
    if inner := sorted(
        p.parent.name for p in folder.glob(f"*/{FILE}") if not p.parent.name.startswith("last")
    ):
        return f"give one of {', '.join(inner)} in it"
    if (folder / "args.json").exists():
        return "its run has saved no model yet, go on with it (--resume)"
    return "give a run's folder, or the file itself"


def download(repo_id: str, **options: Any) -> Path:
    """The model file under this id, from the hub or its local cache; `options` of huggingface_hub's
    `hf_hub_download`.

    Raises:
        InputError: it cannot be had; the message says why.
    """
    # here: only whoever asks the hub waits for it
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, FILE, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{repo_id}: no such local file, and not to be had from the hub ({reason}); "
            "a path to a model.safetensors or a run's folder works without network"
        ) from None


def model_file(source: str | Path) -> Path:
    """The model's file that is meant by itself, or by the folder of its run."""
    path = Path(source)
    return path / FILE if path.is_dir() else path


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], Metadata]:
    """(state dict, metadata) of a file that `save` wrote, or of the one in a run's folder.

    Raises:
        InputError: the file is missing, not ours, or of a newer format.
    """
    path = model_file(path)
    about = describe_file(path)

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118  (not a dict)
    # also of types that torch has not
    except (SafetensorError, LookupError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a model file of this project ({error!s:.300}); {ADVICE}"
        ) from error


def describe_file(path: str | Path) -> Metadata:
    """What a file that `save` wrote says of itself; arguments and errors as of `load`."""
    path = model_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such model file; train it first, or correct the path")

    def metadata(fields: dict[str, Any]) -> Metadata:
        about = Metadata(fields)
        about.source = str(path)
        return about

    try:
        with safe_open(path, "pt") as file:
            about = metadata(file.metadata() or {})
            about.shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (not a dict)

        about.pop("format", None)  # safetensors' own
        for key, text in about.items():
            about[key] = json.loads(text, object_hook=metadata)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a model file of this project ({error!s:.300}); {ADVICE}"
        ) from error

    version = about.get("fewshot_format")
    if not isinstance(version, int):
        raise InputError(
            f"{path}: not a model file of this project (it does not describe itself); {ADVICE}"
        )
    if version > FORMAT:
        raise InputError(
            f"{path}: written by a newer version (format {version}, this one reads {FORMAT})"
        )

    for key, kind in KINDS.items():
        value = about.get(key, kind())
        names = value if kind is list and isinstance(value, list) else ()
        if not isinstance(value, kind) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: its {key!r} is {value!r:.60}; {ADVICE}")
    return about


@contextmanager
def naming(about: Mapping[str, Any]) -> Iterator[None]:
    """What goes wrong while something is made of a file's metadata is an `InputError` that names it.

    The error is quoted: it may be the file's, or that of the code which makes something of it.
    """
    source = getattr(about, "source", "the model")
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError):
            reason = str(error)
        else:
            reason = (
                f"what it says of itself does not suit this code ({error!r:.300}): was it saved by "
                "another recipe, or is it of a class that has changed since?"
            )
        raise InputError(reason if source in reason else f"{source}: {reason}") from error


def on_meta(about: Metadata, make: Callable[[], nn.Module]) -> nn.Module:
    """The model that `make` makes of a file's metadata, on the meta device: it takes no memory.

    Raises:
        InputError: `make` fails; the message names the file.
    """
    with naming(about), torch.device("meta"):
        return make()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or PyTorch file, which may have them under `state_dict` or
    `model`.

    Raises:
        InputError: it cannot be read, or holds other objects, whose code is not run.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; correct the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)

        state = unpickled(path)
        if isinstance(state, dict):
            state = state.get("state_dict", state.get("model", state))
        if flaw := state_flaw(state):
            raise ValueError(flaw)
        return state
    except Exception as error:  # torch stumbles over many things in a file that is damaged
        reason = f"{str(error).partition(chr(10))[0]:.300}"
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is no file of tensors alone"
        raise InputError(
            f"{path} cannot be read as weights ({reason}): give a .safetensors or .pth file"
        ) from error


def unpickled(path: Path) -> Any:
    """What a PyTorch file holds, of which no code is run.

    Raises:
        Exception: of any kind, if it is damaged, or a zip bomb; `pickle.UnpicklingError` if it
            holds other objects than tensors.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > path.stat().st_size:  # torch does not compress
            raise ValueError(f"it would unpack to {size} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def state_flaw(state: Any) -> str | None:
    """What keeps something from being a state dict of tensors, each of which is as large as what is
    in the file.
    """
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(t, torch.Tensor) for t in state.values())
    ):
        return "it has no state dict of tensors alone"
    for name, t in state.items():
        if not isinstance(name, str):
            return f"the name {name!r:.60} is no text"
        dense = t.layout == torch.strided and t.device.type == "cpu" and not t.is_quantized
        if not dense or t.untyped_storage().nbytes() < t.nbytes:
            return f"{name!r:.100} is no plain tensor"
    return None


def downloaded(published: Any, name: str, advice: str) -> dict[str, torch.Tensor]:
    """One of torchvision's state dicts, an entry of a weights enumeration, downloaded once.

    Raises:
        InputError: that fails; the message ends with `advice`.
    """
    try:
        return dict(published.get_state_dict(check_hash=True))
    except OSError as error:
        raise InputError(
            f"{name}'s ImageNet weights cannot be downloaded ({error}): {advice}"
        ) from error


def load_of(
    classes: Sequence[str], path: str | Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`load` of a model to go on from, which must know exactly these classes in this order.

    Raises:
        InputError: as `load`, or it knows others.
    """
    state, about = load(path)
    if about["classes"] != list(classes):
        raise InputError(
            f"{path} knows {', '.join(about['classes'])}; this needs {', '.join(classes)}"
        )
    return state, about


def fill(
    model: nn.Module, state: dict[str, torch.Tensor], source: str | Path, fresh: Sequence[str] = ()
) -> None:
    """Copy `state` into `model`; tensors whose names begin with one of `fresh` keep the model's own
    values.

    Raises:
        InputError: any other tensor is missing, left over or of another shape; the message names it
            and `source`.
    """
    check_fit(model, {name: tensor.shape for name, tensor in state.items()}, source, fresh)
    given = {n: t for n, t in state.items() if not n.startswith(tuple(fresh))}
    model.load_state_dict(given, strict=False)


def check_fit(
    model: nn.Module, shapes: Shapes, source: str | Path, fresh: Sequence[str] = ()
) -> None:
    """Raises InputError as `fill` does; the model may be on torch's meta device, where it takes no
    memory.
    """
    wanted = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(fresh))}
    given = {n: tuple(shape) for n, shape in shapes.items() if not n.startswith(tuple(fresh))}
    for name in sorted(wanted.keys() ^ given.keys()):
        what = "is missing from" if name in wanted else "does not belong to this model but is in"
        raise InputError(
            f"{name:.200} {what} {source}: was it made with another backbone or recipe?"
        )
    for name, shape in given.items():
        if shape != wanted[name].shape:
            raise InputError(
                f"{name} is {shape} in {source}, this model has {tuple(wanted[name].shape)}"
            )


def fill_part(
    module: nn.Module, path: str | Path, prefix: str, without: Sequence[str] = ()
) -> None:
    """Copy the tensors of the model `path`, as of `load`, whose names begin with `prefix` into
    `module`; all must fit.

    Those whose names go on with one of `without` are left where they are, on either side.

    Raises:
        InputError: as `load` and `fill` do, or no tensor has such a name.
    """
    state, _ = load(path)
    part = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    if not part:
        raise InputError(f"{path} has no tensor {prefix}*: it is a model of another kind")
    fill(module, part, path, fresh=without)


def digest(path: str | Path) -> str:
    """SHA-256 of a model's file, or of the one in a run's folder: which base model a result comes
    from.
    """
    return hashlib.sha256(model_file(path).read_bytes()).hexdigest()


def commit() -> str:
    """The git commit of this code, with a + when files differ from it; "unknown" outside a git
    checkout.
    """
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
