"""Published figures of devices and machines that need not be present.

Rates are dense peaks (without structured sparsity) as vendors publish them. A model reaches less; the planner has to
discount that. "float32" is the rate of ordinary float32 products; the rate of TF32, if the device has it, is under
"tfloat32". bfloat16 is missing if the device has no such arithmetic. Memory is the published figure in units of
10**9 bytes, which is at most what the driver reports. A link's bandwidth is that of one direction, half of what data
sheets print for NVLink and PCIe.

Collectives are priced on a ring through all ranks. Within a node a hop is NVLink, or PCIe if there is no NVLink. Across
nodes NCCL's rings leave a node through all its network cards, so that one rank's share of a hop is bounded by the
node's total network bandwidth, and by the link inside the node.

Source: beside each figure; latencies a hop from NCCL's src/graph/tuning.cc, `hwLat` of Ring with Simple: 3.4 us
NVLink, 5.7 us PCIe, 14 us network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.hardware import Hardware, Link, Rates

_HOP_SECONDS = {"NVLink": 3.4e-6, "PCIe": 5.7e-6, "network": 14e-6}
_GB, _TERA = 10**9, 1e12

# Device memory of CUDA's context, kernel code included, before the allocator reserves any; assumed.
CONTEXT_BYTES = 576 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device as its vendor describes it, and the node it is usually sold in.

    Attributes:
        title: the vendor's name.
        memory_gb: device memory, 10**9 bytes.
        memory_gb_s: bandwidth of the device memory, 10**9 bytes a second.
        tflops: peak of dense matrix products by dtype, 10**12 FLOP/s.
        nvlink_gb_s: bandwidth of all NVLink links, both directions, 10**9 bytes a second; None without NVLink.
        pcie_gb_s: bandwidth of PCIe, both directions, 10**9 bytes a second.
        source: the publication of these figures.
        node_devices: devices in the usual node, among which its cores and memory are divided.
        node_cores: CPU cores of the node.
        node_dram_gb: DRAM of the node, 10**9 bytes.
        node_dram_gb_s: bandwidth of all DRAM of the node, 10**9 bytes a second.
        node_network_gbit_s: bandwidth of all the node's network cards for computing, one direction, 10**9 bits a
            second.
        node_source: the node that these figures are of, and their publication.
    """

    title: str
    memory_gb: int
    memory_gb_s: float
    tflops: dict[str, float]
    nvlink_gb_s: float | None
    pcie_gb_s: float
    source: str
    node_devices: int
    node_cores: int
    node_dram_gb: int
    node_dram_gb_s: float
    node_network_gbit_s: float
    node_source: str


_HOPPER_TFLOPS = {"float32": 66.9, "tfloat32": 494.7, "bfloat16": 989.4, "float16": 989.4}
_AMPERE_TFLOPS = {"float32": 19.5, "tfloat32": 156.0, "bfloat16": 312.0, "float16": 312.0}

DEVICES: dict[str, Device] = {
    "H100-80GB": Device(
        title="NVIDIA H100 SXM5 80GB",
        memory_gb=80,
        memory_gb_s=3350,
        tflops=_HOPPER_TFLOPS,
        nvlink_gb_s=900,
        pcie_gb_s=128,
        source="NVIDIA H100 Tensor Core GPU data sheet and architecture white paper, H100 SXM5 (sparse halved)",
        node_devices=8,
        node_cores=112,
        node_dram_gb=2000,
        node_dram_gb_s=614.4,
        node_network_gbit_s=8 * 400,
        node_source="NVIDIA DGX H100 data sheet: 2 x 56 cores, 2 TB, 8 x 400 Gb/s ConnectX-7 for computing;"
        " 2 x 8 channels of DDR5-4800 (Intel Xeon Platinum 8480C)",
    ),
    "H200-141GB": Device(
        title="NVIDIA H200 SXM 141GB",
        memory_gb=141,
        memory_gb_s=4800,
        tflops=_HOPPER_TFLOPS,
        nvlink_gb_s=900,
        pcie_gb_s=128,
        source="NVIDIA H200 Tensor Core GPU data sheet, H200 SXM (arithmetic that of H100 SXM5)",
        node_devices=8,
        node_cores=112,
        node_dram_gb=2000,
        node_dram_gb_s=614.4,
        node_network_gbit_s=8 * 400,
        node_source="NVIDIA DGX H200 data sheet: 2 x 56 cores, 2 TB, 8 x 400 Gb/s ConnectX-7 for computing;"
        " 2 x 8 channels of DDR5-4800 (Intel Xeon Platinum 8480C)",
    ),
    "B200-180GB": Device(
        title="NVIDIA B200 SXM 180GB",
        memory_gb=180,
        memory_gb_s=8000,
        tflops={"float32": 80.0, "tfloat32": 1100.0, "bfloat16": 2250.0, "float16": 2250.0},
        nvlink_gb_s=1800,
        pcie_gb_s=128,
        source="NVIDIA Blackwell Architecture Technical Brief, HGX B200 at 1,000 W (sparse halved); memory of DGX"
        " B200 data sheet, 1,440 GB and 64 TB/s over 8",
        node_devices=8,
        node_cores=112,
        node_dram_gb=2000,
        node_dram_gb_s=716.8,
        node_network_gbit_s=8 * 400,
        node_source="NVIDIA DGX B200 data sheet: 2 x 56 cores, 2 TB, 8 x 400 Gb/s ConnectX-7 for computing;"
        " 2 x 8 channels of DDR5-5600 (Intel Xeon Platinum 8570)",
    ),
    "A100-40GB": Device(
        title="NVIDIA A100 SXM4 40GB",
        memory_gb=40,
        memory_gb_s=1555,
        tflops=_AMPERE_TFLOPS,
        nvlink_gb_s=600,
        pcie_gb_s=64,
        source="NVIDIA A100 Tensor Core GPU data sheet, A100 40GB SXM",
        node_devices=8,
        node_cores=128,
        node_dram_gb=1000,
        node_dram_gb_s=409.6,
        node_network_gbit_s=8 * 200,
        node_source="NVIDIA DGX A100 320GB data sheet: 2 x 64 cores, 1 TB, 8 x 200 Gb/s ConnectX-6 for computing;"
        " 2 x 8 channels of DDR4-3200 (AMD EPYC 7742)",
    ),
    "A100-80GB": Device(
        title="NVIDIA A100 SXM4 80GB",
        memory_gb=80,
        memory_gb_s=2039,
        tflops=_AMPERE_TFLOPS,
        nvlink_gb_s=600,
        pcie_gb_s=64,
        source="NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM",
        node_devices=8,
        node_cores=128,
        node_dram_gb=2000,
        node_dram_gb_s=409.6,
        node_network_gbit_s=8 * 200,
        node_source="NVIDIA DGX A100 640GB data sheet: 2 x 64 cores, 2 TB, 8 x 200 Gb/s ConnectX-6 for computing;"
        " 2 x 8 channels of DDR4-3200 (AMD EPYC 7742)",
    ),
    "V100-32GB": Device(
        title="NVIDIA V100 SXM2 32GB",
        memory_gb=32,
        memory_gb_s=900,
        tflops={"float32": 15.7, "float16": 125.0},
        nvlink_gb_s=300,
        pcie_gb_s=32,
        source="NVIDIA V100 Tensor Core GPU data sheet, V100 for NVLink",
        node_devices=8,
        node_cores=40,
        node_dram_gb=512,
        node_dram_gb_s=153.6,
        node_network_gbit_s=4 * 100,
        node_source="NVIDIA DGX-1 with V100 data sheet: 2 x 20 cores, 512 GB, 4 x 100 Gb/s InfiniBand EDR;"
        " 2 x 4 channels of DDR4-2400 (Intel Xeon E5-2698 v4)",
    ),
    "L4-24GB": Device(
        title="NVIDIA L4 24GB",
        memory_gb=24,
        memory_gb_s=300,
        tflops={"float32": 30.3, "tfloat32": 60.0, "bfloat16": 121.0, "float16": 121.0},
        nvlink_gb_s=None,
        pcie_gb_s=64,
        source="NVIDIA L4 Tensor Core GPU data sheet (sparse figures halved)",
        node_devices=8,
        node_cores=48,
        node_dram_gb=384,
        node_dram_gb_s=281.6,
        node_network_gbit_s=100,
        node_source="Google Cloud g2-standard-96: 8 x L4, 96 threads, 384 GB, 100 Gb/s;"
        " assumed 2 x 6 channels of DDR4-2933 (Intel Xeon, 2nd generation)",
    ),
    "L40S-48GB": Device(
        title="NVIDIA L40S 48GB",
        memory_gb=48,
        memory_gb_s=864,
        tflops={"float32": 91.6, "tfloat32": 183.0, "bfloat16": 362.0, "float16": 362.0},
        nvlink_gb_s=None,
        pcie_gb_s=64,
        source="NVIDIA L40S GPU data sheet",
        node_devices=8,
        node_cores=96,
        node_dram_gb=1536,
        node_dram_gb_s=409.6,
        node_network_gbit_s=400,
        node_source="AWS g6e.48xlarge: 8 x L40S, 192 threads, 1,536 GB, 400 Gb/s;"
        " 2 x 8 channels of DDR4-3200 (AMD EPYC, 3rd generation)",
    ),
    "RTX4090-24GB": Device(
        title="NVIDIA GeForce RTX 4090 24GB",
        memory_gb=24,
        memory_gb_s=1008,
        tflops={"float32": 82.6, "tfloat32": 82.6, "bfloat16": 165.2, "float16": 165.2},
        nvlink_gb_s=None,
        pcie_gb_s=64,
        source="NVIDIA Ada GPU Architecture white paper, appendix A (tensor rates with FP32 accumulate)",
        node_devices=1,
        node_cores=8,
        node_dram_gb=64,
        node_dram_gb_s=89.6,
        node_network_gbit_s=10,
        node_source="assumed: a workstation with 8 cores, 64 GB, 2 channels of DDR5-5600 and 10 Gb/s Ethernet;"
        " no vendor's reference",
    ),
    "RTX3090-24GB": Device(
        title="NVIDIA GeForce RTX 3090 24GB",
        memory_gb=24,
        memory_gb_s=936,
        tflops={"float32": 35.6, "tfloat32": 35.6, "bfloat16": 71.0, "float16": 71.0},
        # The NVLink bridge joins only pairs of cards and is sold separately, so it is not counted.
        nvlink_gb_s=None,
        pcie_gb_s=64,
        source="NVIDIA Ampere GA102 GPU Architecture white paper, appendix A (tensor rates with FP32 accumulate)",
        node_devices=1,
        node_cores=8,
        node_dram_gb=64,
        node_dram_gb_s=51.2,
        node_network_gbit_s=10,
        node_source="assumed: a workstation with 8 cores, 64 GB, 2 channels of DDR4-3200 and 10 Gb/s Ethernet;"
        " no vendor's reference",
    ),
}


def named(text: str, nodes: int = 1) -> Hardware:
    """Implement `Hardware.named`, whose docstring has the arguments and errors.

    A node of more or fewer devices than the usual node has cores, DRAM and network in proportion. Disks are left out,
    because no figures of disks are published with the devices.

    Source: the module's docstring.
    """
    count, device = _parse(text)
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise PlanError(f"nodes={nodes!r} is not accepted; give a whole number, 1 or more.")
    memory_bytes = device.memory_gb * _GB
    dram_bytes = device.node_dram_gb * _GB // device.node_devices
    interconnect = None if count == 1 else "PCIe" if device.nvlink_gb_s is None else "NVLink"
    return Hardware(
        kind="cuda",
        name=device.title,
        memory_bytes=memory_bytes,
        memory_free_bytes=memory_bytes - CONTEXT_BYTES,
        nodes=nodes,
        ranks_per_node=count,
        cores=max(1, device.node_cores * count // device.node_devices),
        dram_bytes=dram_bytes,
        dram_available_bytes=dram_bytes,
        interconnect=interconnect,
        rates=_rates(device, count, nodes),
        origin="catalogue",
    )


def _parse(text: str) -> tuple[int, Device]:
    accepted = f"accepted: a count, 'x' and one of {', '.join(DEVICES)}, such as '8xH100-80GB'"
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX]\s*)?(\S+)\s*", text) if isinstance(text, str) else None
    if match is None:
        raise PlanError(f"{text!r} names no hardware; {accepted}.")
    device = next((known for name, known in DEVICES.items() if name.lower() == match[2].lower()), None)
    if device is None:
        raise PlanError(f"{match[2]!r} is not in the table of published figures; {accepted}.")
    count = int(match[1] or 1)
    if count < 1:
        raise PlanError(f"{text!r} names {count} devices; give 1 or more.")
    return count, device


def _rates(device: Device, count: int, nodes: int) -> Rates:
    pcie = Link(latency_seconds=_HOP_SECONDS["PCIe"], bandwidth=device.pcie_gb_s / 2 * _GB)
    ring = _ring(device, count, nodes) if count * nodes > 1 else None
    inside = _ring(device, count, 1) if count > 1 and nodes > 1 else None
    return Rates(
        matmul={name: rate * _TERA for name, rate in device.tflops.items()},
        memory_bandwidth=device.memory_gb_s * _GB,
        host_memory_bandwidth=device.node_dram_gb_s / device.node_devices * _GB,
        all_gather=ring,
        reduce_scatter=ring,
        all_reduce=ring,
        node_all_gather=inside,
        node_reduce_scatter=inside,
        host_to_device=pcie,
        device_to_host=pcie,
    )


def _ring(device: Device, count: int, nodes: int) -> Link:
    """Return the link of the slowest hop of a ring through all ranks."""
    inside = "PCIe" if device.nvlink_gb_s is None else "NVLink"
    bandwidth = (device.nvlink_gb_s or device.pcie_gb_s) / 2 * _GB
    if nodes == 1:
        return Link(latency_seconds=_HOP_SECONDS[inside], bandwidth=bandwidth)
    network = device.node_network_gbit_s / 8 * _GB * count / device.node_devices
    between = min(network, bandwidth) if count > 1 else network
    # One of `count` consecutive hops crosses the network.
    latency_seconds = ((count - 1) * _HOP_SECONDS[inside] + _HOP_SECONDS["network"]) / count
    return Link(latency_seconds=latency_seconds, bandwidth=between)
