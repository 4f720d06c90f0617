"""Find the repeated blocks of an nn.Module, other modules worth all-gathering separately, and the FSDP groups.

A chain is a ModuleList, Sequential or ModuleDict. Its members of one class are repeated blocks if there are at least
two of them and they own matrices (parameters of two or more dimensions). It follows:

- nested chains: the outermost counts; the inside of a block is not searched. A stage that occurs once is searched.
- heterogeneous chains: each class that repeats forms blocks; the other members belong to the root.
- encoder and decoder, or several stages: each chain is treated separately.
- one object several times in a chain (shared layers): one block, named by its first position.
- a member that is itself a container without a forward is not a block; it is searched.
- a member that torch.compile wraps counts as the module it wraps.
- no chain with repeated members: no blocks, and the root is the only group.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.workload.batch import tensor_bytes

_CHAINS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# The number of groups of about equal size to aim for in a model without repeated blocks.
_GROUPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """An FSDP group: the parameters that FSDP all-gathers and frees together.

    Attributes:
        modules: the block, or the root module, in the order of their names.
        parameters: names of the parameters that the group owns, as `named_parameters` gives them first.
        shared: names under which the group's modules use parameters that the root owns, because several groups use
            them (tied) or because of their dtype.
    """

    modules: tuple[nn.Module, ...]
    parameters: tuple[str, ...]
    shared: tuple[str, ...] = ()


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of `module` by fully qualified name, in the order of `named_modules`; may be empty."""
    blocks: dict[str, nn.Module] = {}
    _search("", module, blocks, set())
    return blocks


def find_wraps(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules outside repeated blocks that are large enough to be all-gathered separately, by name.

    Embeddings and heads qualify at half a block's bytes or more. A model without repeated blocks is split into modules
    of about an eighth of its bytes: a larger module is replaced by its large submodules, if it has any. Tied parameters
    count for no module. Whether other modules read their parameters is known only from the step.

    Source: similar to torch.distributed.fsdp.wrap.size_based_auto_wrap_policy.
    """
    blocks = find_blocks(module)
    groups = find_groups(module)
    sizes = {
        name: sum(tensor_bytes(module.get_parameter(parameter)) for parameter in group.parameters)
        for name, group in groups.items()
    }
    aim = max((sizes[name] for name in blocks), default=sizes[""] // _GROUPS)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # Tied parameters have several names and are left out.
    rest = {name: tensor_bytes(module.get_parameter(name)) for name in groups[""].parameters}
    rest = {name: size for name, size in rest.items() if len(names[id(module.get_parameter(name))]) == 1}
    found: dict[str, nn.Module] = {}
    if aim:
        _split("", module, rest, aim, frozenset(map(id, blocks.values())), found)
    return found


def find_groups(module: nn.Module, wraps: Collection[str] = ()) -> dict[str, Group]:
    """Return the FSDP groups of `module` by name: one for each block, one for each of `wraps`, and `""`, the root.

    The root owns all other parameters. It also owns a parameter that several blocks, or a block and the rest, use: a
    group frees its parameters after forward, and the other user would find them freed. And it owns trainable parameters
    of a block whose dtype is not that of most of the block's bytes: a group reduce-scatters gradients of one dtype.

    Args:
        module: any module.
        wraps: names of modules outside of its blocks.
    """
    blocks = find_blocks(module)
    blocks |= {name: module.get_submodule(name) for name in wraps}
    paths = _block_paths(module, blocks)
    owners: dict[int, set[str]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(_block_of(name, paths))
        names.setdefault(id(parameter), []).append(name)
    own: dict[str, list[str]] = {block: [] for block in (*blocks, "")}
    shared: dict[str, list[str]] = {block: [] for block in (*blocks, "")}
    for key, aliases in names.items():
        owner = next(iter(owners[key])) if len(owners[key]) == 1 else ""
        own[owner].append(aliases[0])
        for alias in aliases:
            used_in = _block_of(alias, paths)
            if used_in != owner:
                shared[used_in].append(alias)
    for block in blocks:
        trained = {name: one for name in own[block] if (one := module.get_parameter(name)).requires_grad}
        dtypes = trained_dtypes(trained.values())
        others = [name for name, one in trained.items() if one.dtype != dtypes[0]]
        own[block] = [name for name in own[block] if name not in others]
        own[""] += others
        shared[block] += others
    modules = {**blocks, "": module}
    return {
        name: Group(modules=(modules[name],), parameters=tuple(own[name]), shared=tuple(shared[name])) for name in own
    }


def trained_dtypes(parameters: Iterable[nn.Parameter]) -> list[torch.dtype]:
    """Return the dtypes of the trainable parameters, in descending order of bytes."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in parameters:
        if parameter.requires_grad and not is_lazy(parameter):
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + tensor_bytes(parameter)
    # The sort is stable: of equal bytes, the first dtype stays first.
    return sorted(sizes, key=lambda dtype: -sizes[dtype])


def no_such_module(option: str, name: str, module: nn.Module, among: Collection[str]) -> PlanError:
    """Return the error for an option of a plan that names no submodule.

    Args:
        option: The name of the option.
        name: The name that it has.
        module: The module.
        among: The valid names.
    """
    near = difflib.get_close_matches(name, among, 1)
    return PlanError(
        f"{option} has {name!r} and {type(module).__name__} has no such module; give names that named_modules"
        f" has{f', such as {near[0]!r}' if near else ''}."
    )


def _split(
    prefix: str,
    module: nn.Module,
    sizes: dict[str, int],
    aim: int,
    blocks: frozenset[int],
    found: dict[str, nn.Module],
) -> None:
    """Add the large submodules of `module` to `found`; `sizes` has the bytes of the parameters that count."""
    children = {f"{prefix}{name}": child for name, child in compat.all_children(module)}
    within = {path: sum(size for name, size in sizes.items() if name.startswith(f"{path}.")) for path in children}
    for path, child in children.items():
        if id(child) in blocks or within[path] < aim / 2 or isinstance(child, torch.jit.ScriptModule):
            continue
        parts: dict[str, nn.Module] = {}
        has_blocks = any(id(part) in blocks for part in child.modules())
        if has_blocks or within[path] > 2 * aim or not has_forward(child):
            _split(f"{path}.", child, sizes, aim, blocks, parts)
        if not parts and not has_blocks and has_forward(child):
            parts = {path: child}
        found.update({name: part for name, part in parts.items() if part not in found.values()})


def _block_paths(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, str]:
    """Map every path in `module` that leads to a block to that block's name."""
    names = {id(block): name for name, block in blocks.items()}
    return {
        path: names[id(found)] for path, found in module.named_modules(remove_duplicate=False) if id(found) in names
    }


def _block_of(parameter_name: str, paths: dict[str, str]) -> str:
    """Return the name of the block that contains the named parameter; `""` for the root."""
    parts = parameter_name.split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((paths[prefix] for prefix in prefixes if prefix in paths), "")


def _search(prefix: str, module: nn.Module, blocks: dict[str, nn.Module], seen: set[int]) -> None:
    """Add the blocks below `module` to `blocks`; `seen` holds the ids of modules already searched or added."""
    if id(module) in seen:
        return
    seen.add(id(module))
    members = compat.all_children(module)
    repeated = _repeated_classes(module, [member for _, member in members])
    for name, member in members:
        path = f"{prefix}.{name}" if prefix else name
        if compat.compiled_module(member).__class__ in repeated and has_forward(member):
            if id(member) not in seen:
                seen.add(id(member))
                blocks[path] = member
        else:
            _search(path, member, blocks, seen)


def _repeated_classes(module: nn.Module, members: list[nn.Module]) -> set[type[nn.Module]]:
    if not isinstance(module, _CHAINS):
        return set()
    counts = Counter(type(compat.compiled_module(member)) for member in members if _owns_matrix(member))
    return {kind for kind, count in counts.items() if count > 1}


def _owns_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def has_forward(module: nn.Module) -> bool:
    """Return whether `module` has a forward of its own; containers do not."""
    return type(compat.compiled_module(module)).forward is not nn.Module.forward
