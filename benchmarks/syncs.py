"""Operators that make the host wait for the device, counted in a training loop or in any other code."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from batches import Clocked
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# operators whose value or shape the host reads; a CPU dispatches the same ones, so that a CPU can test for them
_READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
            "bincount", "equal", "is_nonzero")  # fmt: skip
_CUDA = "called a synchronizing CUDA operation"


class _Creations(TorchFunctionMode):
    """Count tensors made of Python's numbers on a device, which a blocking copy takes there, unseen by the dispatcher.

    A CPU stands for any device.
    """

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            self.found[func.__name__] += output.is_cuda or not torch.cuda.is_initialized()
        return output


class Syncs(TorchDispatchMode):
    """Count synchronising operators by name: `with Syncs() as syncs: ...`, then `syncs.found`.

    Reads of values and of shapes that depend on values, blocking copies between devices, and, on a GPU, whatever else
    torch warns of as synchronising ("cuda").
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.creations = _Creations(self.found)
        self.warned = 0

    def __enter__(self) -> Syncs:
        if torch.cuda.is_initialized():
            self._caught = warnings.catch_warnings(record=True)
            self._messages = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        super().__enter__()
        self.creations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.creations.__exit__(*error)
        super().__exit__(*error)
        if torch.cuda.is_initialized():
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(*error)
            self.warned += sum(_CUDA in str(message.message) for message in self._messages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._waits(func, args, kwargs or {}, output):
            self.found[func.overloadpacket.__name__] += 1
        return output

    def _waits(self, func: Any, args: Any, kwargs: Any, output: Any) -> bool:
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):  # a mask is turned into indices first
            filled = name != "index" and args[2].ndim == 0 and args[2].device.type == "cpu"  # `masked_fill` on a GPU
            return not filled and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
            source = args[1] if name == "copy_" else args[0]
            return source.device != output.device
        return name in _READING

    @property
    def total(self) -> int:
        """All that were found; a GPU's own count, where it is larger."""
        return max(sum(self.found.values()), self.warned)

    def __str__(self) -> str:
        found = dict(self.found) | (dict(cuda=self.warned) if self.warned else {})
        return ", ".join(f"{name} {count}" for name, count in found.items())


class Counted(Clocked):
    """A timed loader that counts the synchronising operators of the timed steps, the loader's own included."""

    def __init__(self, batches: Any, steps: int, warm_up: int = 0) -> None:
        super().__init__(batches, steps, warm_up)
        self.syncs = Syncs()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        iterator = super().__iter__()
        for _ in range(self.warm_up):
            yield next(iterator)
        with self.syncs:  # the loop's body runs while this generator is suspended here
            yield from iterator
