"""Selective activation recomputation: keep the results of products, recompute cheap operations.

Matrix products, convolutions and attention take most of a block's time and produce a fraction of its activations. A
recomputed block may keep their results, and its second forward returns them instead of running the products. A product
runs again if its result was written into since, by the block, by a collective or by later code. A product that draws
random numbers runs again too, so that later draws stay the same. Results are reused in the order in which they were
made, as long as products have the same arguments as then. A write that bypasses torch (into an array that shares its
memory) is not detected.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5 (selective
    activation recomputation); torch.utils.checkpoint.create_selective_checkpoint_contexts, which torch.compile
    supports, and which refuses writes into kept results when the first backward runs.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.flops import is_product
from lightning_largescale.workload.reads import storage_keys
from lightning_largescale.workload.tracker import writes, written

# The contexts of a block's first forward, and of its recomputations in backward.
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def keep_products() -> Contexts:
    """Return the context of the first forward, which keeps results, and that of recomputations, which reuses them."""
    if torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call, no-any-return]
    kept = _SavedResults()
    return _Keeping(kept), _Taking(kept)


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = _is_kept(func) and not _draws(func, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


class _Result:
    """The result of one product, with its arguments and tensor versions, to tell whether it is still valid."""

    def __init__(self, given: Any, made: Any) -> None:
        # Aliases, since the result itself would hold the graph that holds this object: a cycle.
        self.made = map_tensors(made, compat.alias)
        self._versions = [compat.version(tensor) for tensor in tensors_in(self.made)]
        self.storages = _storages(self.made)
        self._given = [(tensor.shape, tensor.dtype, _references(tensor)) for tensor in tensors_in(given)]

    def is_of(self, given: Any) -> bool:
        """Return whether the arguments `given` match those of this result; storages freed since are not compared."""
        now = tensors_in(given)
        return len(now) == len(self._given) and all(
            tensor.shape == shape
            and tensor.dtype == dtype
            and (any(one.expired() for one in references) or references == _references(tensor))
            for tensor, (shape, dtype, references) in zip(now, self._given, strict=True)
        )

    @property
    def is_whole(self) -> bool:
        return self._versions == [compat.version(tensor) for tensor in tensors_in(self.made)]


class _SavedResults:
    """Results by function, in the order in which they were made; None for those that have to be recomputed."""

    def __init__(self) -> None:
        self.results: dict[Any, list[_Result | None]] = defaultdict(list)

    def note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Drop the results that `func` writes into."""
        # Collectives write into tensors without changing their versions.
        collective = func.namespace == "c10d"
        if not collective and not writes(func):
            return
        storages = _storages((args, kwargs) if collective else written(func, args, kwargs))
        for results in self.results.values():
            for index, result in enumerate(results):
                if result is not None and not storages.isdisjoint(result.storages):
                    results[index] = None


class _Mode(compat.DispatchMode):  # type: ignore[no-untyped-call]
    # Like torch's own modes of this kind, ignore compiled functions and higher-order operators.
    supports_higher_order_operators = True

    def __init__(self, kept: _SavedResults) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Keeping(_Mode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if not compat.is_operator(func):
            return made
        self._kept.note_writes(func, args, kwargs)
        if _is_kept(func):
            draws = _draws(func, args, kwargs)
            self._kept.results[func].append(None if draws else _Result((args, kwargs), made))
        return made


class _Taking(_Mode):  # type: ignore[no-untyped-call]
    def __enter__(self) -> Any:
        self._next: dict[Any, int] = defaultdict(int)
        self._follows = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (compat.is_operator(func) and _is_kept(func) and self._follows):
            return func(*args, **kwargs)
        results, index = self._kept.results[func], self._next[func]
        self._next[func] += 1
        if index >= len(results):
            return func(*args, **kwargs)
        # Each result is reused once, so that it is freed after its backward; a second backward runs the product.
        result, results[index] = results[index], None
        if result is not None and not result.is_of((args, kwargs)):
            # The recomputation differs from the first forward, so later results may not match either.
            self._follows, result = False, None
        return func(*args, **kwargs) if result is None or not result.is_whole else result.made


def _storages(tree: Any) -> set[int]:
    return {key for tensor in tensors_in(tree) for key in storage_keys(tensor)}


def _references(tensor: Tensor) -> list[Any]:
    """Return weak references to the storages of `tensor`."""
    return [StorageWeakRef(part.untyped_storage()) for part in compat.dense_parts(tensor)]  # type: ignore[no-untyped-call]


def _is_kept(func: Any) -> bool:
    # A function that writes its result into an argument has to write it again.
    return is_product(func) and not writes(func)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a call draws random numbers; attention does only with dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    return bool(compat.argument(func, "dropout_p", args, kwargs, 1.0))
