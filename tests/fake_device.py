"""A pretended GPU: what would go wrong or wait on one, found on a machine without.

All is computed on the CPU, so that the numbers are a CPU's; only which device a tensor says it is
on, and with it what may meet what, is pretended. A mark on a tensor's storage tells: views,
`detach` and `.data` share it.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 - its operations are to be known
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._unsafe_index_put}
# what the host must wait for: a number, or how long the result is
WAITING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique,
}
WAITING |= {aten._unique2, aten.unique_dim, aten.unique_consecutive, torch.ops.torchvision.nms}
INSTALLED = str(Path(torch.__file__).parents[1])  # not our code
ANSWERS = {Tensor.device.__get__: None, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}


class FakeDevice:
    """Inside a `with` block, `device` can be had by `.to`, `.cuda` and `device=`; as on CUDA,

    - an operation on tensors of both devices raises RuntimeError, unless the CPU's has no
    dimensions, or is an index; - `numpy` of the device's raises TypeError.

    Attributes:
        syncs: for each place in the code ("file:line function"), how often the host waited for the
            device's result.
        copies: for each place, how often it copied something to the device that was not sent ahead
            (`non_blocking`): from pageable memory such a copy waits as well.
    """

    device = torch.device(
        "cuda", 99
    )  # no machine has it: constants that are kept by device meet no real one

    def __init__(self) -> None:
        self.syncs, self.copies = Counter[str](), Counter[str]()
        self.placing = self.heedless = (
            False  # tensors made of nothing are the device's; nothing is counted
        )
        self._modes = _Functions(self), _Operations(self)

    def __enter__(self) -> "FakeDevice":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    def clear(self) -> None:
        self.syncs.clear()
        self.copies.clear()

    def count(self, counter: Counter[str], times: int = 1) -> None:
        if times and not self.heedless:
            counter[_place()] += times

    def names(self, device: Any) -> bool:
        """Whether an argument names this device."""
        return torch.device(device).type == self.device.type


def on_device(tensor: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside of vmap and grad
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return getattr(tensor.untyped_storage(), "on_fake_device", False)


def _mark(tensor: Tensor, on: bool = True) -> Tensor:
    tensor.untyped_storage().on_fake_device = on
    return tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place() -> str:
    """The innermost line of our own code that is being run."""
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith(INSTALLED) or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


class _Functions(TorchFunctionMode):
    """What Python says: devices, and tensors that come to torch or leave it."""

    def __init__(self, fake: FakeDevice):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fake, kwargs = self.fake, dict(kwargs or {})
        placing = ours = any(map(on_device, _tensors((args, kwargs))))
        if ours and func in ANSWERS:
            return fake.device if ANSWERS[func] is None else ANSWERS[func]
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs)
        if ours and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(
                f"can't convert {fake.device} device type tensor to numpy: use Tensor.cpu() first"
            )
        if kwargs.get("device") is not None and (placing := fake.names(kwargs["device"])):
            kwargs["device"] = "cpu"
        fake.count(fake.syncs, ours and func is Tensor.tolist)
        before = fake.placing, fake.heedless
        # on CUDA one_hot does not look at its labels
        fake.placing, fake.heedless = placing, fake.heedless or func is torch.nn.functional.one_hot
        try:
            result = func(*args, **kwargs)
        finally:
            fake.placing, fake.heedless = before
        if (
            placing
            and func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            and not on_device(result)
        ):
            fake.count(fake.copies)
            _mark(result)
        return _mark(result) if ours and func is Tensor.__deepcopy__ else result

    def _move(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        fake, x = self.fake, args[0]
        named = kwargs.get("device", args[1] if len(args) > 1 else None)
        target, result = func is Tensor.cuda, x
        if func is Tensor.to:
            target = on_device(named if isinstance(named, Tensor) else x)
            if isinstance(named, (str, int, torch.device)):
                target = fake.names(named)
                args, kwargs = (
                    (x, "cpu", *args[2:]),
                    {k: v for k, v in kwargs.items() if k != "device"},
                )
            result = Tensor.to(*args, **kwargs)
        if target == on_device(x):
            return result
        ahead = kwargs.get("non_blocking") or any(argument is True for argument in args)
        fake.count(fake.copies if target else fake.syncs, not (target and ahead))
        return _mark(
            result.clone() if result.untyped_storage() is x.untyped_storage() else result, target
        )


class _Operations(TorchDispatchMode):
    """What is computed, backwards too."""

    def __init__(self, fake: FakeDevice):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, func.overloadpacket
        given = _tensors((args, kwargs))
        ours = any(map(on_device, given))
        if ours:
            self._check(func, args, kwargs, [tensor for tensor in given if not on_device(tensor)])
        result = func(*args, **kwargs)
        if (ours and not (kind is aten.copy_ and not on_device(args[0]))) or (
            not given and self.fake.placing
        ):
            for tensor in _tensors(result):
                _mark(tensor)
        return result

    def _check(self, func: Any, args: tuple, kwargs: dict[str, Any], foreign: list[Tensor]) -> None:
        fake, kind = self.fake, func.overloadpacket
        if kind is aten.copy_:
            return fake.count(fake.copies if on_device(args[0]) else fake.syncs, bool(foreign))
        if kind in INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
            number = len(args) > 2 and not on_device(args[2])
            fills = number and len(masks) == len(indices)  # which needs not know where
            fake.count(
                fake.copies, sum(not on_device(index) for index in indices) + (number and not fills)
            )
            fake.count(fake.syncs, 0 if fills else sum(map(on_device, masks)))
            foreign = [
                tensor for tensor in foreign if all(tensor is not index for index in indices)
            ]
        changed = func._schema.is_mutable and any(tensor is args[0] for tensor in foreign)
        if changed or any(tensor.dim() for tensor in foreign):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {fake.device} and cpu"
            )
        sizeless = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        fake.count(fake.syncs, kind in WAITING or sizeless)
