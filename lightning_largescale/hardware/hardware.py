"""Hardware data classes: one machine, or several equal ones, as the planner needs them, with JSON serialization.

Every figure of "one rank" is that of one process while all processes of its node run, because they share cores, memory
and disks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_largescale.errors import PlanError
from lightning_largescale.serialize import (
    above_zero,
    accepting,
    at_least,
    from_fields,
    not_negative,
    one_of,
    take_version,
)

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

HARDWARE_VERSION = 1
_MATMUL = accepting(
    "an object of names and numbers above 0, 'float32' among them",
    lambda rates: "float32" in rates and all(rate > 0 for rate in rates.values()),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A link between ranks, or between a device and its host.

    A collective over `p` ranks takes `hops * (latency_seconds + hop_bytes / bandwidth)`: all-gather and
    reduce-scatter make `p - 1` hops of one shard's bytes, all-reduce makes `2 * (p - 1)` hops of the tensor's bytes
    over `p`. A copy between device and host is one hop.

    Attributes:
        latency_seconds: seconds that a hop takes at least, however few its bytes.
        bandwidth: bytes per second, one direction.

    Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH", section 4 (ring
    algorithms).
    """

    latency_seconds: float = field(metadata=not_negative())
    bandwidth: float = field(metadata=above_zero())


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A mounted file system that we may write to.

    Attributes:
        path: a writable folder on it.
        filesystem: the kernel's name of its type, such as "ext4".
        free_bytes: bytes that an unprivileged process may still write.
        refused: the reason why it cannot be the nvme tier, in words; None if it can.
    """

    path: str
    filesystem: str
    free_bytes: int = field(metadata=at_least(0))
    refused: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of one rank while all ranks of its node work.

    Attributes:
        matmul: FLOP/s of matrix products by dtype name; "float32" is always present, "tfloat32" only in published
            figures. A missing dtype must not be planned with: the device lacks it, or its products end the process.
        memory_bandwidth: bytes per second of the device's memory, counting both read and written bytes.
        fresh_memory: bytes per second at which the system hands out memory that the process writes for the first time;
            None on CUDA, whose allocator keeps its memory.
        all_gather: link of the all-gather over all ranks of all nodes, on an otherwise idle network; None with one
            process.
        reduce_scatter: link of the reduce-scatter, likewise.
        all_reduce: link of the all-reduce, likewise.
        node_all_gather: link of the all-gather inside one of several nodes; None with one node, and if unknown:
            `calibrate` measures over all ranks only.
        node_reduce_scatter: link of the reduce-scatter inside a node, likewise.
        host_memory_bandwidth: bytes per second of DRAM, counted as in `memory_bandwidth`, while every rank uses it;
            None on CPU, where DRAM is the device's memory.
        host_to_device: link of pinned-memory copies to the device; None on CPU.
        device_to_host: link of pinned-memory copies from the device; None on CPU.
        disk_read: bytes per second read with O_DIRECT; None if no disk takes it.
        disk_write: bytes per second overwritten with O_DIRECT; None if no disk takes it.
    """

    matmul: Mapping[str, float] = field(metadata=_MATMUL)
    memory_bandwidth: float = field(metadata=above_zero())
    fresh_memory: float | None = field(default=None, metadata=above_zero())
    all_gather: Link | None = None
    reduce_scatter: Link | None = None
    all_reduce: Link | None = None
    node_all_gather: Link | None = None
    node_reduce_scatter: Link | None = None
    host_memory_bandwidth: float | None = field(default=None, metadata=above_zero())
    host_to_device: Link | None = None
    device_to_host: Link | None = None
    disk_read: float | None = field(default=None, metadata=above_zero())
    disk_write: float | None = field(default=None, metadata=above_zero())

    def matmul_rate(self, dtype: str) -> float | None:
        """Return the FLOP/s of matrix products in `dtype`; None if the device cannot compute them.

        Unmeasured dtypes that every device computes are derived from float32's rate: float16 has the same rate, float64
        half of it, because its elements take twice the bytes in the same vector units.
        """
        guesses = {"float16": self.matmul["float32"], "float64": self.matmul["float32"] / 2}
        return self.matmul.get(dtype, guesses.get(dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain types that JSON can hold; `from_dict` reads them back to equal rates."""
        return {**asdict(self), "matmul": dict(self.matmul)}

    @classmethod
    def from_dict(cls, fields: Any) -> Rates:
        """Return the rates with these fields.

        Raises:
            PlanError: a field is missing, unknown, or not of the accepted type or range.
        """
        return from_fields(cls, fields, "rates")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The hardware to plan for: `nodes` equal machines, each running `ranks_per_node` processes of one device each.

    Attributes:
        kind: the device tier, "cpu" or "cuda". On "cpu" it is the process's share of DRAM.
        name: the device's own name.
        memory_bytes: total bytes of one rank's device tier.
        memory_free_bytes: bytes that one rank may still allocate there; on CUDA without its context.
        nodes: number of machines.
        ranks_per_node: processes on each machine.
        cores: CPU cores of the node that this process may run on (affinity mask).
        dram_bytes: DRAM of one rank: of the machine, or of the tightest limit on it, divided among the node's ranks.
        dram_available_bytes: DRAM bytes that one rank may still allocate.
        disks: mounted file systems, those that can be the nvme tier first, most free bytes first.
        interconnect: "NVLink" or "PCIe" between the node's devices; None with a single device, or if unknown.
        rates: the rates measured by `calibrate`, or published; None if neither.
        origin: "detected", "catalogue" or "file".
    """

    kind: str = field(metadata=one_of("cpu", "cuda"))
    name: str
    memory_bytes: int = field(metadata=at_least(0))
    memory_free_bytes: int = field(metadata=at_least(0))
    nodes: int = field(default=1, metadata=at_least(1))
    ranks_per_node: int = field(default=1, metadata=at_least(1))
    cores: int = field(metadata=at_least(1))
    dram_bytes: int = field(metadata=at_least(0))
    dram_available_bytes: int = field(metadata=at_least(0))
    disks: tuple[Disk, ...] = ()
    interconnect: str | None = field(default=None, metadata=one_of("NVLink", "PCIe"))
    rates: Rates | None = field(default=None, repr=False)
    origin: str = field(default="detected", metadata=one_of("detected", "catalogue", "file"))

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.nodes * self.ranks_per_node

    @classmethod
    def detect(
        cls,
        *,
        accelerator: str | None = None,
        environment: ClusterEnvironment | None = None,
        ranks_per_node: int | None = None,
        nodes: int | None = None,
    ) -> Hardware:
        """Detect this machine; nothing is measured and no collective is called.

        Args:
            accelerator: "cpu", or "cuda" (also "gpu"); None or "auto" uses CUDA if torch sees a device.
            environment: Lightning's cluster environment, which knows the number of processes; None uses the process
                group, if one is up.
            ranks_per_node: processes on each node; None: as the environment says, else one per CUDA device, else 1.
            nodes: number of machines; None: as the environment says, else 1.

        CUDA devices are looked at in a forked child unless this process has initialized CUDA. If the child fails, CUDA
        is initialized in this process, which must not be forked after that.

        Raises:
            PlanError: the accelerator is not accepted or not present, or the counts contradict each other.
        """
        from lightning_largescale.hardware.detect import detect

        return detect(accelerator=accelerator, environment=environment, ranks_per_node=ranks_per_node, nodes=nodes)

    def calibrate(
        self,
        *,
        seconds: float = 5.0,
        progress: bool = True,
        matmul_sizes: Sequence[tuple[int, int, int]] | None = None,
    ) -> Hardware:
        """Return this hardware with measured `rates`, from the cache if they were measured within 30 days.

        With a process group up this is a collective: every rank calls it with the same arguments, and every rank gets
        the rates of the slowest. The cache is `$LARGESCALE_CACHE`, else `$XDG_CACHE_HOME/lightning_largescale`, else
        `~/.cache/lightning_largescale`. On several nodes collectives are measured over all ranks, not inside a node.

        Args:
            seconds: upper bound of the time spent measuring.
            progress: whether to show a progress bar on rank 0; not shown if stderr is no terminal.
            matmul_sizes: `(m, k, n)` of the matrix products to measure, such as the workload's, which
                `planner.matmuls.matmul_sizes` returns; None: a cube.

        Raises:
            PlanError: the hardware was not detected here, or its ranks are not those of the process group.
            RuntimeError: a rank failed; every rank raises, none is left waiting.
        """
        from lightning_largescale.hardware.calibrate import calibrate

        return calibrate(self, seconds=seconds, progress=progress, matmul_sizes=matmul_sizes)

    @classmethod
    def named(cls, text: str, nodes: int = 1) -> Hardware:
        """Return hardware that need not be present, from published figures: `Hardware.named("8xH100-80GB", nodes=4)`.

        Args:
            text: number and name of the devices in a node, `"<count>x<name>"`, or the name alone for one device.
            nodes: number of such machines.

        Raises:
            PlanError: the name is not in the table, or a count is below 1.
        """
        from lightning_largescale.hardware.catalogue import named

        return named(text, nodes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain types that JSON can hold, with the version of the format."""
        fields = asdict(self)
        fields["disks"] = list(fields["disks"])
        fields["rates"] = None if self.rates is None else self.rates.to_dict()
        return {"version": HARDWARE_VERSION, **fields}

    @classmethod
    def from_dict(cls, fields: Any) -> Hardware:
        """Return the hardware with these fields; the inverse of `to_dict`.

        Raises:
            PlanError: the version is newer, or a field is missing, unknown, or not of the accepted type or range.
        """
        if isinstance(fields, Mapping):
            fields = take_version(fields, HARDWARE_VERSION, "hardware")
        return from_fields(cls, fields, "hardware", also=("version",))

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON to `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """Read a file that `save` wrote, with `origin` set to "file".

        Raises:
            PlanError: the file does not exist or is no JSON, or an error of `from_dict`, with the path in front.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(
                f"hardware file {str(path)!r} cannot be read ({error.strerror}); give one that .save wrote."
            ) from error
        except ValueError as error:
            raise PlanError(f"{path}: the hardware is no JSON ({error}); give a file that .save wrote.") from error
        try:
            return cls.from_dict({**fields, "origin": "file"} if isinstance(fields, dict) else fields)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
