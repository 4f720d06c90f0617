"""Plan: every decision about how a model is trained, in one frozen dataclass that can be stored as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import (
    AMOUNTS,
    check_choice,
    check_count,
    check_flag,
    check_names,
    check_offload,
    check_path,
    check_recomputation,
)
from lightning_largescale.plan_words import describe
from lightning_largescale.serialize import take_version
from lightning_largescale.units import parse_bytes

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.workload import Workload

PLAN_VERSION = 1

# The data type of each precision's matrix products; the hardware must support it.
MATMUL_TYPE = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "16-mixed": "float16",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "64-true": "float64",
}

_ACCEPTED: dict[str, tuple[str | None, ...]] = {
    "precision": tuple(MATMUL_TYPE),
    "activation_checkpointing": ("none", "selective", "full"),
    "checkpointed_operations": ("all", "cheap"),
    **dict.fromkeys(("offload_parameters", "offload_optimizer", "offload_activations"), (None, "cpu", "nvme")),
}


def _refusing_unknown_fields(cls: type[Plan]) -> type[Plan]:
    """Make the generated constructor raise `PlanError`, not `TypeError`, for an unknown or positional argument."""
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
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Plan:
    """Decisions about how one model is trained on one set of devices; `Plan()` is a plain run on one device.

    Attributes:
        dp_replicate: number of groups of devices that each hold the full model; their gradients are averaged.
        dp_shard: number of devices that the parameters, gradients and optimizer state are sharded over.
        reshard_after_forward: whether to reshard parameters after a block's forward and all-gather them again in
            backward (ZeRO-3); False keeps them unsharded until after backward (ZeRO-2). Ignored with `dp_shard=1`.
        wrapped_modules: names of modules outside of repeated blocks (large embeddings and heads) that are FSDP groups
            of their own, as blocks are; all other parameters stay unsharded for the whole step. Ignored if parameters
            are neither sharded nor offloaded.
        row_sharded_embeddings: names of `nn.Embedding` and `nn.EmbeddingBag` modules whose rows are sharded over all
            devices and looked up by an exchange of ids; their gradients are sparse. Ignored on one device.
        tp: number of devices that the matrices of blocks are sharded over (tensor parallel), each computing its part of
            every sample.
        sequence_parallel: whether each tensor-parallel rank computes and keeps a part of the sequence between these
            matrices (norms, residuals), where all ranks would compute the same. Ignored with `tp=1`.
        precision: Lightning's name of the precision: "32-true"; "bf16-mixed" or "16-mixed", matrix products in 16 bits
            and weights in float32; "bf16-true", "16-true" or "64-true", weights and everything else in that type.
        activation_checkpointing: "none"; "full": every repeated block keeps its input and recomputes its forward in
            backward; "selective": the blocks in `checkpointed_blocks` do.
        checkpointed_blocks: names, as in `named_modules`, of the blocks to recompute under "selective"; None under
            "none" and "full".
        checkpointed_operations: operations that these blocks recompute: "all" of their forward, or only the "cheap"
            ones: then they keep the results of matrix products, convolutions and attention.

        offload_parameters: tier of the parameters of blocks while the blocks do not compute: None, the device; "cpu",
            DRAM; "nvme", a disk. Their gradients are offloaded to it too.
        offload_optimizer: tier of the optimizer state, which is paged in and out around each step.
        host_optimizer_step: whether parameters with offloaded state are stepped in DRAM by the CPU cores, to which
            their gradients are copied; otherwise their state is copied to the device. Ignored on the CPU.
        offload_activations: tier of the tensors that blocks save for backward.
        nvme_path: a folder on the disk of the nvme tier; None selects the disk with the most free bytes.
        resident_parameter_bytes: bytes of a rank's parameters that stay on the device despite offload, in entire
            blocks; None: only those outside of blocks. This and the next three may be given as text, such as "2GiB".
        cpu_parameter_bytes: bytes of the parameters offloaded with "nvme" that are kept in DRAM.
        resident_optimizer_bytes: bytes of a rank's optimizer state that stay on the device, in entire pages; None: 0.
        cpu_optimizer_bytes: bytes of the optimizer state offloaded with "nvme" that are kept in DRAM.
        offloaded_blocks: names of the blocks whose activations are offloaded; None: all.
        prefetched_blocks: number of blocks to prefetch ahead of the one that computes.
        release_gradients: whether to update a block's parameters as soon as its gradients are complete in backward, and
            free these gradients.

    Raises:
        PlanError: a field is unknown, or its value is not of the accepted type or range.

    Source: Rajbhandari et al. 2020, "ZeRO", section 5 (stages); Zhao et al. 2023, "PyTorch FSDP", section 3.2 (hybrid
        sharding); Shoeybi et al. 2019, "Megatron-LM", section 3 (tensor parallelism); Korthikanti et al. 2022,
        "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2 (sequence parallelism);
        Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (the memory hierarchy); Ren et al. 2021, "ZeRO-Offload",
        section 4 (the step on the host); Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with
        Limited Resources", section 3 (gradient release).
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
    offload_parameters: str | None = None
    offload_optimizer: str | None = None
    host_optimizer_step: bool = False
    offload_activations: str | None = None
    nvme_path: str | None = None
    resident_parameter_bytes: int | None = None
    cpu_parameter_bytes: int | None = None
    resident_optimizer_bytes: int | None = None
    cpu_optimizer_bytes: int | None = None
    offloaded_blocks: tuple[str, ...] | None = None
    prefetched_blocks: int = 1
    release_gradients: bool = False

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "tp"):
            check_count(name, getattr(self, name), "devices")
        check_count("prefetched_blocks", self.prefetched_blocks, "blocks")
        for name in ("sequence_parallel", "reshard_after_forward", "host_optimizer_step", "release_gradients"):
            check_flag(name, getattr(self, name))
        for name, accepted in _ACCEPTED.items():
            check_choice(name, getattr(self, name), accepted)
        if self.nvme_path is not None:
            object.__setattr__(self, "nvme_path", check_path("nvme_path", self.nvme_path))
        for name in AMOUNTS:
            if isinstance(amount := getattr(self, name), str):
                object.__setattr__(self, name, parse_bytes(amount, name=name))
        for check in (check_recomputation, check_names, check_offload):
            # JSON and YAML give names as a list.
            for name, names in check(self).items():
                object.__setattr__(self, name, names)

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
        if (self.offload_activations or self.offload_parameters) and not workload.blocks:
            field = "offload_activations" if self.offload_activations else "offload_parameters"
            raise PlanError(
                f"{field}={getattr(self, field)!r} needs repeated blocks and {workload.name} has none; use None."
            )
        for name in self.wrapped_modules:
            if name not in workload.wraps:
                accepted = f"accepted are {', '.join(map(repr, workload.wraps))}" if workload.wraps else "there is none"
                raise PlanError(
                    f"wrapped_modules has {name!r}, which is no module of {workload.name} that is large, outside of its"
                    f" repeated blocks, and alone in reading its parameters; {accepted}."
                )

    def check_blocks(self, blocks: Collection[str]) -> None:
        """Check the names in `checkpointed_blocks` and `offloaded_blocks` against those of a model's repeated blocks.

        Raises:
            PlanError: a name is not in `blocks`.
        """
        for field in ("checkpointed_blocks", "offloaded_blocks"):
            for name in getattr(self, field) or ():
                if name in blocks:
                    continue
                near = difflib.get_close_matches(name, blocks, 1) or list(blocks)[:1]
                raise PlanError(
                    f"{field} has {name!r}, which is no repeated block of the model; accepted are its"
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
    def shards(self) -> bool:
        """Return whether the ranks hold shards of the parameters."""
        return self.dp_shard > 1 or self.tp > 1

    @property
    def gathers(self) -> bool:
        """Return whether parameters of blocks are gathered before blocks compute, from other ranks or another tier."""
        return self.shards or self.offload_parameters is not None

    @property
    def offloads(self) -> bool:
        """Return whether parameters, optimizer state or activations are offloaded."""
        return any((self.offload_parameters, self.offload_optimizer, self.offload_activations))

    @property
    def heap(self) -> Literal["left", "trimmed", "watched", "mapped"]:
        """Treatment of heap fragmentation on the CPU.

        "left": none; "trimmed": the heap is trimmed between steps; "watched": it is trimmed whenever it outgrows what
        the step needs; "mapped": tensors are allocated outside of it.

        Source: parallel/heap.py, which gives the reasons.
        """
        if self.dp_shard > 1 or self.offload_parameters is not None or self.offload_activations is not None:
            return "mapped"
        if self.activation_checkpointing != "none" or self.offload_optimizer is not None or self.release_gradients:
            return "watched"
        return "trimmed" if self.world_size > 1 else "left"

    def describe(self) -> str:
        """Return the plan in words: `"ZeRO-3 over 4 devices, full activation checkpointing, 32-true"`."""
        return describe(self)

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
