"""The matrix products that some work executes, noted as it runs, and the same ones again without the rest.

Their time is what the work cannot go below. What stands in for an operand has its shape, strides, dtype and place in a
storage of the same size, so that it comes from memory or from a cache as the operand did.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_)
_Key = tuple[int, torch.dtype]


class _View(NamedTuple):
    """An operand: a view of the storage `key`."""

    key: _Key
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Product(NamedTuple):
    function: Callable[..., Tensor]
    args: list[Any]
    kwargs: dict[str, Any]


class Products(TorchDispatchMode):
    """Used as a context it notes products; called, it executes them again."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._noted: list[_Product] = []
        self._sizes: dict[_Key, int] = {}
        self._storages: dict[_Key, Tensor] = {}

    def __len__(self) -> int:
        return len(self._noted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket in _PRODUCTS:
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
            noted = ([self._view(x) for x in args], {name: self._view(x) for name, x in kwargs.items()})
            self._noted.append(_Product(function, *noted))
        return function(*args, **kwargs)

    def _view(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        key = (storage.data_ptr(), value.dtype)
        self._sizes[key] = max(self._sizes.get(key, 0), storage.nbytes() // value.element_size())
        return _View(key, value.shape, value.stride(), int(value.storage_offset()))

    @torch.no_grad()
    def __call__(self) -> None:
        if not self._storages:
            self._storages = {key: torch.ones(count, dtype=key[1]) for key, count in self._sizes.items()}
        for function, args, kwargs in self._noted:
            function(*map(self._again, args), **{name: self._again(x) for name, x in kwargs.items()})

    def _again(self, value: Any) -> Any:
        if not isinstance(value, _View):
            return value
        return self._storages[value.key].as_strided(value.size, value.stride, value.offset)
