"""Plan: every decision about how a model is trained, in one frozen dataclass that JSON can hold.

Errors a user can cause by a plan, or by a model and machine that fit none, are one type:

    ValueError
      PlanError: what was given, what is accepted, what to do
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.workload import Workload

PLAN_VERSION = 1

# The type of the matrix products of each precision; hardware that cannot compute them cannot carry it out.
MATMUL_TYPE = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "16-mixed": "float16",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "64-true": "float64",
}

_ACCEPTED: dict[str, tuple[str, ...]] = {
    "precision": tuple(MATMUL_TYPE),
    "activation_checkpointing": ("none", "selective", "full"),
    "checkpointed_operations": ("all", "cheap"),
}


class PlanError(ValueError):
    """A plan that cannot be carried out, or a wish for one; the message gives what was found and what is accepted."""


def _refusing_unknown_fields(cls: type[Plan]) -> type[Plan]:
    """Make the generated constructor answer an unknown or positional argument with `PlanError`, not `TypeError`."""
    generated: Callable[..., None] = cls.__init__

    @functools.wraps(generated)
    def init(self: Plan, *args: Any, **fields: Any) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        if args:
            raise PlanError(
                f"Plan takes its fields by name and got {args[0]!r} without one; accepted: {', '.join(known)}."
            )
        for name, value in fields.items():
            if name not in known:
                raise PlanError(f"{name}={value!r} is no field of a Plan; accepted: {', '.join(known)}.")
        generated(self, **fields)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_refusing_unknown_fields
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How one model is trained on one set of devices. `Plan()` is the plain run on one device.

    Attributes:
        dp_replicate: groups of devices that each hold the whole model, their gradients averaged.
        dp_shard: devices that a model's parameters, gradients and optimizer state are divided among.
        reshard_after_forward: gathered parameters are dropped after a block's forward and gathered again in backward
            (ZeRO-3); False keeps them until after backward (ZeRO-2). Means nothing with `dp_shard=1`.
        wrapped_modules: names of modules outside of repeated blocks (large embeddings and heads) that are gathered by
            themselves, as blocks are; what lies outside of both stays gathered for the whole step. Means nothing with
            `dp_shard=1`.
        row_sharded_embeddings: names of `nn.Embedding` and `nn.EmbeddingBag` modules whose rows are divided over all
            devices and looked up by an exchange of ids; their gradients are sparse. Means nothing on one device.
        tp: devices that the matrices of blocks are divided among, each computing its part of every sample.
        sequence_parallel: between these matrices, where each of them would compute the same (norms, residuals), each
            computes and keeps a part of the sequence. Means nothing with `tp=1`.
        precision: Lightning's name of the arithmetic: "32-true"; "bf16-mixed" or "16-mixed", matrix products in half
            the bytes and weights in float32; "bf16-true", "16-true" or "64-true", weights and all in that type.
        activation_checkpointing: "none"; "full": every repeated block keeps its input and runs its forward again in
            backward; "selective": some do.
        checkpointed_blocks: names of the blocks that do under "selective", as `named_modules` has them; None with the
            others.
        checkpointed_operations: what these blocks run again: "all" of their forward, or what is "cheap": then they keep
            the results of matrix products, convolutions and attention.

    Raises:
        PlanError: an unknown field, or a field whose value is not of the accepted type or range.

    Source: Rajbhandari et al. 2020, "ZeRO", section 5 (stages); Zhao et al. 2023, "PyTorch FSDP", section 3.2 (hybrid
        sharding); Shoeybi et al. 2019, "Megatron-LM", section 3 (tensor parallelism); Korthikanti et al. 2022,
        "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2 (sequence parallelism).
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    reshard_after_forward: bool = True
    precision: str = "32-true"
    activation_checkpointing: str = "none"
    checkpointed_blocks: tuple[str, ...] | None = None
    checkpointed_operations: str = "all"
    wrapped_modules: tuple[str, ...] = ()
    row_sharded_embeddings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "tp"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{name}={value!r} is not accepted; give a whole number of devices, 1 or more.")
        for name in ("sequence_parallel", "reshard_after_forward"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise PlanError(f"{name}={value!r} is not accepted; give True or False.")
        for name, accepted in _ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                raise PlanError(f"{name}={value!r} is not accepted; give {_either(accepted)}.")
        if self.activation_checkpointing == "none" and self.checkpointed_operations != "all":
            raise PlanError(
                f"checkpointed_operations={self.checkpointed_operations!r} contradicts activation_checkpointing='none';"
                " give 'full' or 'selective', or 'all' operations."
            )
        self._check_checkpointed_blocks()
        self._check_names()

    def _check_checkpointed_blocks(self) -> None:
        blocks = self.checkpointed_blocks
        if self.activation_checkpointing != "selective":
            if blocks is not None:
                raise PlanError(
                    f"checkpointed_blocks={blocks!r} contradicts"
                    f" activation_checkpointing={self.activation_checkpointing!r}; give 'selective', or no blocks."
                )
            return
        if not _are_names(blocks) or not blocks:
            raise PlanError(
                f"checkpointed_blocks={blocks!r} is not accepted with activation_checkpointing='selective';"
                " give the names of the blocks, at least one and each once."
            )
        # From JSON and YAML they come as a list.
        object.__setattr__(self, "checkpointed_blocks", tuple(blocks))

    def _check_names(self) -> None:
        for field in ("wrapped_modules", "row_sharded_embeddings"):
            names = getattr(self, field)
            if not _are_names(names):
                raise PlanError(f"{field}={names!r} is not accepted; give the names of modules, each once, or none.")
            object.__setattr__(self, field, tuple(names))
        for field, refused in (("tp", self.tp > 1), ("precision", self.precision == "16-mixed")):
            if self.row_sharded_embeddings and refused:
                raise PlanError(
                    f"row_sharded_embeddings={self.row_sharded_embeddings!r} cannot be combined with"
                    f" {field}={getattr(self, field)!r}; leave one of them out."
                )

    @property
    def world_size(self) -> int:
        """Number of devices, one process each, that the plan needs."""
        return self.dp_replicate * self.dp_shard * self.tp

    def validate(self, hardware: Hardware | None = None, workload: Workload | None = None) -> None:
        """Check the plan against the machine and the model it is meant for; what is None is not checked.

        Raises:
            PlanError: the sizes do not multiply to the number of processes, the devices cannot compute in the
                precision (known once they have rates), or the model cannot take what the plan asks for.
        """
        if hardware is not None:
            self._check_hardware(hardware)
        if workload is not None:
            self._check_workload(workload)

    def _check_hardware(self, hardware: Hardware) -> None:
        self.check_world_size(hardware.world_size)
        matmul_type = MATMUL_TYPE[self.precision]
        if hardware.rates is not None and hardware.rates.matmul_rate(matmul_type) is None:
            raise PlanError(
                f"precision={self.precision!r} needs matrix products in {matmul_type}, which {hardware.name} cannot"
                " compute; use '32-true'."
            )

    def _check_workload(self, workload: Workload) -> None:
        if not workload.parameters:
            raise PlanError(f"{workload.name} has no parameters, so there is nothing to train; give it at least one.")
        if self.activation_checkpointing != "none" and not workload.blocks:
            raise PlanError(
                f"activation_checkpointing={self.activation_checkpointing!r} needs repeated blocks"
                f" and {workload.name} has none; use 'none'."
            )
        self.check_blocks(workload.blocks)
        for name in self.wrapped_modules:
            if name not in workload.wraps:
                accepted = f"accepted are {', '.join(map(repr, workload.wraps))}" if workload.wraps else "there is none"
                raise PlanError(
                    f"wrapped_modules has {name!r}, which is no module of {workload.name} that is large, outside of its"
                    f" repeated blocks, and alone in reading its parameters; {accepted}."
                )

    def check_blocks(self, blocks: Collection[str]) -> None:
        """Check the names in `checkpointed_blocks` against those of a model's repeated blocks.

        Raises:
            PlanError: one of them is not among `blocks`.
        """
        for name in self.checkpointed_blocks or ():
            if name not in blocks:
                near = difflib.get_close_matches(name, blocks, 1) or list(blocks)[:1]
                raise PlanError(
                    f"checkpointed_blocks has {name!r}, which is no repeated block of the model; accepted are its"
                    f" {len(blocks)}, such as {near[0]!r}."
                )

    def check_world_size(self, world: int) -> None:
        """Check the sizes against the number of processes.

        Raises:
            PlanError: they do not multiply to `world`.
        """
        if self.world_size != world:
            raise PlanError(
                f"dp_replicate={self.dp_replicate}, dp_shard={self.dp_shard}, tp={self.tp} makes {self.world_size} and"
                f" there {'is 1 process' if world == 1 else f'are {world} processes'}; dp_replicate * dp_shard * tp"
                f" must be their number, {world} (devices * num_nodes of a Trainer), for example"
                f" {self._sizes_for(world)}."
            )

    def _sizes_for(self, world: int) -> str:
        """Sizes that multiply to `world`, those of the plan kept where they divide it."""
        tp = self.tp if world % self.tp == 0 else 1
        data = world // tp
        sizes = {"dp_shard": data}
        if self.dp_replicate > 1:
            replicas = next(size for size in (self.dp_replicate, data // self.dp_shard or 1, 1) if data % size == 0)
            sizes = {"dp_replicate": replicas, "dp_shard": data // replicas}
        if tp > 1:
            sizes["tp"] = tp
        return ", ".join(f"{name}={size}" for name, size in sizes.items())

    @property
    def dp(self) -> int:
        """Number of ranks that see samples of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> bool:
        """Whether the ranks hold parts of the parameters, and not all of them."""
        return self.dp_shard > 1 or self.tp > 1

    @property
    def heap(self) -> Literal["left", "trimmed", "watched", "mapped"]:
        """What is done on the CPU about the holes that steps leave in a process's heap: nothing, it is trimmed between
        steps, it is trimmed whenever it outgrows what the step needs, or tensors are kept out of it.

        Source: parallel/heap.py, which says why.
        """
        if self.dp_shard > 1:
            return "mapped"
        if self.activation_checkpointing != "none":
            return "watched"
        return "trimmed" if self.world_size > 1 else "left"

    def describe(self) -> str:
        """The plan in words: `"ZeRO-3 over 4 devices, full activation checkpointing, 32-true"`."""
        stage = "ZeRO-3" if self.reshard_after_forward else "ZeRO-2"
        if self.dp_shard > 1 and self.dp_replicate > 1:
            layout = f"HSDP: {self.dp_replicate} replicas, each {stage} over {self.dp_shard} devices"
        elif self.dp_shard > 1:
            layout = f"{stage} over {self.dp_shard} devices"
        elif self.dp_replicate > 1:
            layout = f"replicated on {self.dp_replicate} devices"
        else:
            layout = "" if self.tp > 1 else "plain, one device"
        if self.tp > 1:
            among = f"tensor{' and sequence' if self.sequence_parallel else ''} parallel over {self.tp} devices"
            layout = f"{layout}, each {among}" if layout else among
        recompute = {"none": "", "full": ", full activation checkpointing"}.get(self.activation_checkpointing)
        if recompute is None:
            count = len(self.checkpointed_blocks or ())
            recompute = f", activation checkpointing of {count} block{'s' if count > 1 else ''}"
        count = len(self.wrapped_modules) if self.dp_shard > 1 else 0
        by = "s gathered by themselves" if count > 1 else " gathered by itself"
        wraps = f", {count} more module{by}" if count else ""
        if (count := len(self.row_sharded_embeddings)) and self.world_size > 1:
            wraps += f", {count} row-sharded table{'s' if count > 1 else ''}"
        if self.checkpointed_operations == "cheap":
            recompute += " but for products"
        return f"{layout}{wraps}{recompute}, {self.precision}"

    def to_json(self) -> str:
        """JSON text with the version of its format; `from_json` reads it back to an equal plan."""
        return json.dumps({"version": PLAN_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote, or that a person typed; a missing field has its default.

        Raises:
            PlanError: not JSON, of a newer version, or with a field or value that is not accepted, or a field twice.
        """
        try:
            fields = json.loads(text, object_pairs_hook=_once_each)
        except json.JSONDecodeError as error:
            raise PlanError(f'the plan is no JSON ({error}); give an object such as {{"dp_shard": 2}}.') from error
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """The plan with these fields; `"version"`, when present, is that of the format.

        Raises:
            PlanError: not a mapping of field names, of a newer version, or with a field or value that is not accepted.
        """
        if not isinstance(fields, Mapping):
            raise PlanError(
                f'a plan is an object of fields and this is {fields!r}; give one such as {{"dp_shard": 2}}.'
            )
        fields = dict(fields)
        version = fields.pop("version", PLAN_VERSION)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise PlanError(f"version={version!r} is not accepted; give a whole number from 1 to {PLAN_VERSION}.")
        if version > PLAN_VERSION:
            raise PlanError(
                f"the plan is of version {version} and this release reads up to {PLAN_VERSION};"
                " upgrade lightning-largescale, or plan again with this one."
            )
        return cls(**fields)

    @classmethod
    def of(cls, given: Plan | Mapping[str, Any] | str | Path) -> Plan:
        """The plan that a user means: one, a mapping of its fields, or the path of its JSON.

        Raises:
            PlanError: `given` is none of these, or what `from_dict` or `load` raises.
        """
        if isinstance(given, Plan):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        if isinstance(given, str | Path):
            return cls.load(given)
        raise PlanError(
            f"plan={given!r} is no plan; give a Plan, a mapping of its fields, or the path of a plan's JSON."
        )

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read the plan in the file at `path`.

        Raises:
            PlanError: there is no such file, it is no text, or what `from_json` raises, with the path in front.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"plan file {str(path)!r} cannot be read ({error.strerror}); give the path of a plan's JSON."
            ) from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path}: the plan is no text in UTF-8 ({error.reason}); give a plan's JSON.") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _are_names(value: object) -> bool:
    """Whether `value` is a list or tuple of texts, each once."""
    named = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return named and len(set(value)) == len(value)  # type: ignore[arg-type, call-overload]


def _either(values: tuple[str, ...]) -> str:
    """`"'a', 'b' or 'c'"`."""
    *others, last = map(repr, values)
    return f"{', '.join(others)} or {last}"


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object, of which json alone would keep the last of several of one name."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise PlanError(f"{name!r} is given twice in the plan, {fields[name]!r} and {value!r}; give it once.")
        fields[name] = value
    return fields
