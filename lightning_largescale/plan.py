"""Plan: every decision about how a model is trained, in one frozen dataclass that can be stored as JSON.

`Plan` is the sum of its techniques' fields: `techniques/<name>/fields.py` has those of one technique, with their checks
and words.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_largescale import plan_fields
from lightning_largescale.errors import PlanError
from lightning_largescale.serialize import take_version
from lightning_largescale.techniques.activation_checkpoint.fields import ActivationCheckpointFields
from lightning_largescale.techniques.activation_offload.fields import ActivationOffloadFields
from lightning_largescale.techniques.fully_shard.fields import FullyShardFields
from lightning_largescale.techniques.gradient_release.fields import GradientReleaseFields
from lightning_largescale.techniques.malloc_policy.fields import MallocPolicyFields
from lightning_largescale.techniques.paged_optimizer.fields import PagedOptimizerFields
from lightning_largescale.techniques.parameter_offload.fields import ParameterOffloadFields
from lightning_largescale.techniques.precision.fields import PrecisionFields
from lightning_largescale.techniques.replicate.fields import ReplicateFields
from lightning_largescale.techniques.row_wise_embedding.fields import RowWiseEmbeddingFields
from lightning_largescale.techniques.tensor_parallel.fields import TensorParallelFields

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.workload import Workload

PLAN_VERSION = 1

# The order of the fields in JSON and in words. Fields that are not in it follow, technique by technique.
_ORDER = """
    dp_replicate dp_shard tp sequence_parallel reshard_after_forward precision
    activation_checkpointing checkpointed_blocks checkpointed_operations extra_fsdp_modules row_sharded_embeddings
    offload_parameters offload_optimizer cpu_optimizer_step offload_activations nvme_path
    resident_parameter_bytes cpu_parameter_bytes resident_optimizer_bytes cpu_optimizer_bytes
    offloaded_blocks prefetched_blocks release_gradients
"""

# Fields that were renamed, by their old names, which are read with a DeprecationWarning for one release.
_RENAMED = {"wrapped_modules": "extra_fsdp_modules", "host_optimizer_step": "cpu_optimizer_step"}


def _warn_of_old_name(old: str) -> None:
    warnings.warn(f"Plan.{old} is called {_RENAMED[old]} now; use that name.", DeprecationWarning, stacklevel=3)


def _renamed(old: str) -> property:
    """Return a property that reads a renamed field under its old name."""

    def read(plan: Plan) -> object:
        """Return the renamed field, with a DeprecationWarning."""
        _warn_of_old_name(old)
        return getattr(plan, _RENAMED[old])

    return property(read)


def _fields_in_order(cls: type[Plan]) -> type[Plan]:
    """Sort and document the fields, and let the constructor raise `PlanError` for an unknown or positional argument."""
    ranks = {name: rank for rank, name in enumerate(_ORDER.split())}
    known = sorted(cls.__dataclass_fields__, key=lambda name: ranks.get(name, len(ranks)))
    cls.__dataclass_fields__ = {name: cls.__dataclass_fields__[name] for name in known}
    generated: Callable[..., None] = cls.__init__
    signature = inspect.signature(generated)

    @functools.wraps(generated)
    def init(self: Plan, *args: Any, **fields: Any) -> None:
        if args:
            raise PlanError(
                f"Plan takes its fields by name and got {args[0]!r} without one; accepted: {', '.join(known)}."
            )
        for old in _RENAMED.keys() & fields:
            _warn_of_old_name(old)
            fields[_RENAMED[old]] = fields.pop(old)
        for name, value in fields.items():
            if name not in known:
                raise PlanError(f"{name}={value!r} is no field of a Plan; accepted: {', '.join(known)}.")
        generated(self, **fields)

    self_first = ["self", *known]
    init.__signature__ = signature.replace(parameters=[signature.parameters[name] for name in self_first])  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[method-assign]
    for old in _RENAMED:
        setattr(cls, old, _renamed(old))
    documented = [
        (inspect.getdoc(fields) or "").partition("Attributes:")[2] for fields in plan_fields.techniques_of(cls)
    ]
    cls.__doc__ = f"{inspect.getdoc(cls)}\n\nAttributes:{''.join(documented)}\n"
    return cls


@_fields_in_order
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan(
    FullyShardFields,
    ReplicateFields,
    TensorParallelFields,
    RowWiseEmbeddingFields,
    ParameterOffloadFields,
    PagedOptimizerFields,
    ActivationOffloadFields,
    GradientReleaseFields,
    ActivationCheckpointFields,
    PrecisionFields,
    MallocPolicyFields,
):
    """Decisions about how one model is trained on one set of devices; `Plan()` is a plain run on one device.

    Raises:
        PlanError: a field is unknown, or its value is not of the accepted type or range.
    """

    def __post_init__(self) -> None:
        plan_fields.check_fields(self)

    def __repr__(self) -> str:
        """Return the constructor call without the fields that have their defaults: `Plan(dp_shard=2)`."""
        return f"Plan({', '.join(f'{name}={value!r}' for name, value in self.changed_fields().items())})"

    def changed_fields(self) -> dict[str, object]:
        """Return the fields that differ from their defaults, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    @property
    def world_size(self) -> int:
        """Number of devices, one process each, that the plan needs."""
        return self.dp_replicate * self.dp_shard * self.tp

    def validate(self, hardware: Hardware | None = None, workload: Workload | None = None) -> None:
        """Check the plan against the hardware and the model.

        Args:
            hardware: the hardware; None is not checked.
            workload: the workload of the model; None is not checked.

        Raises:
            PlanError: the sizes do not multiply to the number of processes, the devices cannot compute in the
                precision (known once their rates are measured), or the model does not fit the plan.
        """
        if hardware is not None:
            self.check_world_size(hardware.world_size)
            plan_fields.check_against_hardware(self, hardware)
        if workload is None:
            return
        if not workload.parameters:
            raise PlanError(f"{workload.name} has no parameters, so there is nothing to train; give it at least one.")
        self.check_blocks(workload.blocks)
        plan_fields.check_against_workload(self, workload)

    def check_blocks(self, blocks: Collection[str]) -> None:
        """Check the names of blocks in the fields against those of a model's repeated blocks.

        Raises:
            PlanError: a name is not in `blocks`.
        """
        plan_fields.check_against_blocks(self, blocks)

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
        """Return sizes that multiply to `world`, in words; the plan's sizes are kept if they divide it."""
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
        """Number of data-parallel ranks, each with samples of its own."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks that hold the shards of one replica."""
        return self.dp_shard * self.tp

    @property
    def shards(self) -> bool:
        """Return whether the ranks hold shards of the parameters."""
        return self.ranks_per_replica > 1

    @property
    def gathers(self) -> bool:
        """Return whether parameters of blocks are gathered before blocks compute, from other ranks or another tier."""
        return self.shards or self.offload_parameters is not None

    @property
    def offloads(self) -> bool:
        """Return whether parameters, optimizer state or activations are offloaded."""
        return plan_fields.offloads(self)

    @property
    def last_resorts(self) -> int:
        """Number of techniques in use that are taken only if nothing fits without; the fewer, the simpler."""
        return plan_fields.last_resorts(self)

    def describe(self) -> str:
        """Return the plan in words: `"ZeRO-3 over 4 devices, full activation checkpointing, 32-true"`."""
        return plan_fields.in_words(self)

    def to_json(self) -> str:
        """Return the plan as JSON text with its format version; `from_json` reads it back to an equal plan."""
        return json.dumps({"version": PLAN_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan in JSON text, written by `to_json` or by hand; a missing field has its default.

        Raises:
            PlanError: the text is not JSON, is of a newer version, repeats a field, or has a field or value that is not
                accepted.
        """
        try:
            fields = json.loads(text, object_pairs_hook=_once_each)
        except json.JSONDecodeError as error:
            raise PlanError(f'the plan is no JSON ({error}); give an object such as {{"dp_shard": 2}}.') from error
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """Return the plan with these fields; `"version"`, if present, is the format version.

        Raises:
            PlanError: `fields` is not a mapping, is of a newer version, or has a field or value that is not accepted.
        """
        if not isinstance(fields, Mapping):
            raise PlanError(
                f'a plan is an object of fields and this is {fields!r}; give one such as {{"dp_shard": 2}}.'
            )
        fields = take_version({"version": PLAN_VERSION, **fields}, PLAN_VERSION, "plan")
        return cls(**fields)

    @classmethod
    def of(cls, given: Plan | Mapping[str, Any] | str | Path) -> Plan:
        """Return the plan that a user gave as a Plan, a mapping of its fields, or the path of its JSON.

        Raises:
            PlanError: `given` is none of these, or `from_dict` or `load` raises it.
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
            PlanError: the file cannot be read or is not UTF-8 text, or `from_json` raises it; the path is prepended.
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


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object; raise PlanError for a repeated name, of which json would keep the last."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise PlanError(f"{name!r} is given twice in the plan, {fields[name]!r} and {value!r}; give it once.")
        fields[name] = value
    return fields
