import contextlib
import os
import resource
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from lightning_largescale.hardware.memory_limits import cgroup_limits, machine_memory, process_limits, rank_memory

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712"


class Tree:
    """A made-up /proc and /sys below one folder."""

    def __init__(self, root: Path):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {48 * GIB // 1024} kB\nHuge: 0\n")
        self.write("proc/self/status", f"Name:\tpython\nVmSize:\t{8 * GIB // 1024} kB\nVmData:\t{GIB // 1024} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v1(self, group: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"9:name=systemd:/x\n4:cpu,memory:{group}\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            "30 25 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            f"31 25 0:31 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "32 25 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        )

    def v2(self, group: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{group}\n")
        self.write("proc/self/mountinfo", f"31 25 0:31 {mount_root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")

    def group_v1(self, path: str, limit: int | str, usage: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory{path}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive_file}\n")

    def group_v2(self, path: str, limit: int | str, usage: int, inactive_file: int = 0, high: str = "max") -> None:
        folder = f"sys/fs/cgroup{path}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive_file}\n")


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_without_limits_what_the_machine_has_is_divided(tree):
    assert rank_memory(1, tree.root) == (64 * GIB, 48 * GIB)
    assert rank_memory(4, tree.root) == (16 * GIB, 12 * GIB)


def test_v1_limit_less_usage_without_page_cache(tree):
    tree.v1("/job")
    tree.group_v1("/job", 8 * GIB, 5 * GIB, inactive_file=2 * GIB)
    assert rank_memory(1, tree.root) == (8 * GIB, 5 * GIB)
    assert rank_memory(2, tree.root) == (4 * GIB, 5 * GIB // 2)


def test_v1_largest_number_is_no_limit(tree):
    tree.v1("/job")
    tree.group_v1("/job", NO_LIMIT_V1, GIB)
    assert list(cgroup_limits(tree.root)) == []


def test_v2_max_is_no_limit(tree):
    tree.v2("/job")
    tree.group_v2("/job", "max", GIB)
    assert list(cgroup_limits(tree.root)) == []


def test_v2_limit_less_usage_without_page_cache(tree):
    tree.v2("/a/b")
    tree.group_v2("/a/b", 8 * GIB, 5 * GIB, inactive_file=2 * GIB)
    assert rank_memory(1, tree.root) == (8 * GIB, 5 * GIB)


def test_v2_high_counts_as_a_limit(tree):
    tree.v2("/a")
    tree.group_v2("/a", 8 * GIB, GIB, high=str(4 * GIB))
    assert list(cgroup_limits(tree.root)) == [(4 * GIB, GIB)]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_tightest_of_nested_groups_decides(tree, version):
    getattr(tree, version)("/slice/pod/box")
    group = getattr(tree, f"group_{version}")
    group("/slice/pod/box", 16 * GIB, GIB)
    group("/slice/pod", 8 * GIB, 7 * GIB)  # the least room, though not the least limit
    group("/slice", 4 * GIB, GIB)
    assert list(cgroup_limits(tree.root)) == [(16 * GIB, GIB), (8 * GIB, 7 * GIB), (4 * GIB, GIB)]
    assert rank_memory(1, tree.root) == (4 * GIB, GIB)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("group", "mount_root"), [("/docker/abc", "/docker/abc"), ("/../other", "/"), ("/elsewhere", "/docker/abc")]
)
def test_in_a_container_the_mount_itself_is_the_group(tree, version, group, mount_root):
    getattr(tree, version)(group, mount_root)
    getattr(tree, f"group_{version}")("", 2 * GIB, GIB)
    assert list(cgroup_limits(tree.root)) == [(2 * GIB, GIB)]


def test_a_group_below_the_mounted_part_of_the_tree(tree):
    tree.v1("/docker/abc/inner", "/docker/abc")
    tree.group_v1("/inner", 2 * GIB, GIB)
    assert list(cgroup_limits(tree.root)) == [(2 * GIB, GIB)]


def test_usage_over_the_limit_leaves_nothing(tree):
    tree.v2("/a")
    tree.group_v2("/a", GIB, 2 * GIB)
    assert rank_memory(1, tree.root) == (GIB, 0)


def test_process_limits_are_each_ranks_own(tree):
    limits = {resource.RLIMIT_DATA: 3 * GIB, resource.RLIMIT_AS: 20 * GIB}
    assert list(process_limits(tree.root, limits)) == [(3 * GIB, GIB), (20 * GIB, 8 * GIB)]
    assert list(process_limits(tree.root, dict.fromkeys(limits, resource.RLIM_INFINITY))) == []


def test_damaged_files_are_no_limits(tree):
    tree.v2("/a")
    tree.write("sys/fs/cgroup/a/memory.max", "\n")
    tree.write("sys/fs/cgroup/a/memory.current", "many\n")
    assert rank_memory(1, tree.root) == (64 * GIB, 48 * GIB)


def test_a_system_without_proc_is_asked_through_psutil(tmp_path):
    total, available = machine_memory(tmp_path)
    assert 0 < available <= total


def test_rlimit_of_this_process():
    program = (
        "import resource; from lightning_largescale.hardware.memory_limits import rank_memory;"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({GIB}, {GIB})); print(*rank_memory(2))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == GIB  # not halved: the limit is per process
    assert 0.5 * GIB < int(out[1]) < GIB


@contextlib.contextmanager
def real_cgroup(limit: int):
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, name = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    folder = parent / f"largescale-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"control groups are not writable here: {error.strerror}")
    try:
        try:
            (folder / name).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"the memory controller is not ours to set: {error.strerror}")
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="making a control group needs root")
def test_a_real_control_group():
    program = (
        "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()));"
        "from lightning_largescale.hardware.memory_limits import rank_memory; print(*rank_memory(2))"
    )
    with real_cgroup(GIB) as folder:
        out = subprocess.run(
            [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
        ).stdout.split()
    assert int(out[0]) == GIB // 2
    assert 0.8 * GIB // 2 < int(out[1]) < GIB // 2
