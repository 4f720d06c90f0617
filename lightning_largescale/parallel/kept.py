"""Recomputation by operation: results of products are kept, what is cheap runs again.

Matrix products, convolutions and attention take most of a block's time and make a part of what it saves. A block that
recomputes may keep their results, and its second forward takes these in their place. A result that was written into
since, by the block, by a collective or by what came after, is no longer what the product made: then the product runs
again. So does one that draws random numbers, or later ones would be others.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5 (selective
    activation recomputation); torch.utils.checkpoint.create_selective_checkpoint_contexts, which refuses writes into
    what it keeps, when the first backward runs, and which torch.compile knows.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.tracker import is_product

# Of a block's first forward, and of those in backward.
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def keep_products() -> Contexts:
    """Contexts of a first forward, which keeps, and of those in backward, which take."""
    if torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call, no-any-return]
    kept = _Kept()
    return _Keeping(kept), _Taking(kept)


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = _is_kept(func) and not _draws(func, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


class _Result:
    """What one product made, and whether it still is that."""

    def __init__(self, made: Any) -> None:
        # Aliases, or what was made would hold the graph that holds this.
        self.made = map_tensors(made, compat.alias)
        self.versions = [compat.version(tensor) for tensor in tensors_in(self.made)]
        self.storages = {id(tensor.untyped_storage()) for tensor in tensors_in(self.made)}

    @property
    def is_whole(self) -> bool:
        return self.versions == [compat.version(tensor) for tensor in tensors_in(self.made)]


class _Kept:
    """Results by function, in the order in which they were made; None for those that are to be made again."""

    def __init__(self) -> None:
        self.results: dict[Any, list[_Result | None]] = defaultdict(list)

    def note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keep no longer what `func` writes into."""
        places = _mutated_arguments(func)
        # Collectives write into tensors past their versions.
        collective = func.namespace == "c10d"
        if not places and not collective:
            return
        written = (args, kwargs) if collective else [_argument(place, args, kwargs) for place in places]
        storages = {id(tensor.untyped_storage()) for tensor in tensors_in(written)}
        for results in self.results.values():
            for index, result in enumerate(results):
                if result is not None and not storages.isdisjoint(result.storages):
                    results[index] = None


class _Keeping(compat.DispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._kept.note_writes(func, args, kwargs)
        if _is_kept(func):
            self._kept.results[func].append(None if _draws(func, args, kwargs) else _Result(made))
        return made


class _Taking(compat.DispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __enter__(self) -> Any:
        self._next: dict[Any, int] = defaultdict(int)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_kept(func):
            return func(*args, **kwargs)
        results, index = self._kept.results[func], self._next[func]
        self._next[func] += 1
        if index >= len(results):
            return func(*args, **kwargs)
        # Taken once, so that it is freed when its backward is done; a second backward runs the product.
        result, results[index] = results[index], None
        return func(*args, **kwargs) if result is None or not result.is_whole else result.made


def _is_kept(func: Any) -> bool:
    # What writes its result into a given tensor has to write it again.
    return is_product(func) and not _mutated_arguments(func)


def _argument(place: int | str, args: Any, kwargs: Any) -> Any:
    return args[place] if isinstance(place, int) and place < len(args) else kwargs.get(place)


_mutated_arguments = functools.cache(compat.mutated_arguments)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call draws random numbers: attention does where it drops out."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True
