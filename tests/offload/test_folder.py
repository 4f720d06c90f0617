from __future__ import annotations

import os
import signal
import tempfile

import pytest
from mounting import mounted_tmpfs

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Disk
from lightning_largescale.offload.folder import nvme_folder, remove_stale
from lightning_largescale.offload.store import Store
from lightning_largescale.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore:.*without O_DIRECT")

# A store with a few bytes in it, and a word once they are there.
STORE = """
import mmap, sys
from lightning_largescale.offload.store import Store
store = Store(".")
extent = store.reserve("weights", 2**16)
page = memoryview(mmap.mmap(-1, 2**16))
store.write(extent, page).wait()
print(store.path.name, flush=True)
"""


def disk(path, refused=None):
    return Disk(path=str(path), filesystem="ext4", free_bytes=1, refused=refused)


def mountinfo(tmp_path, filesystem):
    path = tmp_path / "root/proc/self/mountinfo"
    path.parent.mkdir(parents=True)
    path.write_text(f"21 1 8:1 / / rw - {filesystem} source rw\n")
    return tmp_path / "root"


def test_the_plans_own_folder_comes_first(tmp_path):
    plan = Plan(nvme_path=tmp_path)
    assert nvme_folder(plan, [disk("/elsewhere")], root=mountinfo(tmp_path, "ext4")) == tmp_path
    assert os.listdir(tmp_path) == ["root"]


def test_else_the_first_disk_that_is_not_refused():
    found = [disk("/memory", "tmpfs keeps files in memory"), disk("/a"), disk("/b")]
    assert str(nvme_folder(Plan(), found)) == "/a"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([], "there is none that we may write to"),
        ([disk("/m", "tmpfs keeps files in memory")], "/m: tmpfs keeps files"),
    ],
)
def test_no_disk_says_why(found, why):
    with pytest.raises(PlanError, match=f"none was found .{why}.*; give one as nvme_path"):
        nvme_folder(Plan(), found)


def test_a_folder_over_the_network_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"nvme_path='.*' cannot be used: nfs4 is reached over the network; give"):
        nvme_folder(Plan(nvme_path=tmp_path), [], root=mountinfo(tmp_path, "nfs4"))


@pytest.mark.parametrize("filesystem", ["tmpfs", "ramfs"])
def test_a_folder_in_memory_is_taken_with_a_warning(tmp_path, filesystem):
    root = mountinfo(tmp_path, filesystem)
    with pytest.warns(UserWarning, match=f"is no disk: {filesystem} keeps files in memory") as told:
        assert nvme_folder(Plan(nvme_path=tmp_path), [], root=root) == tmp_path
    assert len(told) == 1


@pytest.mark.parametrize("use", [lambda folder: nvme_folder(Plan(nvme_path=folder), []), Store])
def test_a_folder_that_is_none_is_refused(tmp_path, use):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(PlanError, match=rf"nvme_path='{path}' (is a file|does not exist); give a folder"):
            use(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("use", [lambda folder: nvme_folder(Plan(nvme_path=folder), []), Store])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, use):
    with (
        mounted_tmpfs(tmp_path, "ro,size=1m"),
        pytest.raises(PlanError, match=rf"nvme_path='{tmp_path}' cannot be written to \(Read-only file system\)"),
    ):
        use(tmp_path)


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path, start_python):
    process = start_python(STORE + "import signal; signal.pause()")
    left = tmp_path / process.stdout.readline().strip()
    Store(tmp_path).close()
    assert left.is_dir(), "its process lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.is_dir()
    store = Store(tmp_path)
    assert not left.exists()
    assert list(tmp_path.iterdir()) == [store.path]


def test_a_process_ended_by_sigterm_in_the_middle_of_writes(tmp_path, start_python):
    process = start_python(STORE + "while True: transfer = store.write(extent, page)")
    left = tmp_path / process.stdout.readline().strip()
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    assert left.is_dir()
    remove_stale(tmp_path)
    assert not left.exists()


def test_others_folders_stay(tmp_path):
    kept = [tmp_path / name for name in ("largescale-runs", "largescale-12-my_files_1", "largescale-1-abcdefgh.bak")]
    for path in kept:
        path.mkdir()
        (path / "lock").touch()
    kept.append(tmp_path / "largescale-3-abcdefgh")
    kept[-1].mkdir()
    (kept[-1] / "results").touch()
    remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_folder_whose_process_died_before_it_locked_it_is_removed(tmp_path):
    (tmp_path / "largescale-1-abcdefgh").mkdir()
    remove_stale(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_folder_that_another_start_removes_is_made_again(tmp_path, monkeypatch):
    made = []

    def mkdtemp(*arguments, **keywords):
        made.append(original(*arguments, **keywords))
        if len(made) == 1:
            # The moment between making and locking, in which another process looks for stale ones.
            remove_stale(tmp_path)
        return made[-1]

    original = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    store = Store(tmp_path)
    assert [str(path) for path in tmp_path.iterdir()] == [str(store.path)] == made[1:]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("raise KeyError", 1),
        pytest.param("sys.exit(3)", 3, marks=pytest.mark.slow),
        ("[store.write(extent, page) for _ in range(100)]", 0),
        pytest.param("store.close()", 0, marks=pytest.mark.slow),
        ("import os, threading; threading.Thread(target=lambda: store.write(extent, page).wait()).start()", 0),
    ],
)
def test_the_folder_is_gone_however_the_process_ends(tmp_path, start_python, end, code):
    process = start_python(STORE + end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert not list(tmp_path.iterdir())
    assert "Error" not in errors.replace("KeyError", "")


def test_a_forked_process_leaves_the_folder_and_can_use_it(tmp_path, run_python):
    fork = """
import os, pathlib
transfers = [store.write(extent, page) for _ in range(50)]
pid = os.fork()
if pid == 0:
    memory = memoryview(mmap.mmap(-1, 2**16))
    store.read(extent, memory).wait()
    store.write(extent, memory).wait()
    store.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert (store.path / "tensors").exists()
pid = os.fork()
if pid == 0:
    sys.exit(8)  # the copy is not closed
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
assert (store.path / "tensors").exists()
for transfer in transfers: transfer.wait()
store.read(extent, page).wait()
"""
    assert "Error" not in run_python(STORE + fork)
    assert not list(tmp_path.iterdir())


def test_two_stores_on_one_folder(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    assert one.path != two.path
    one.close()
    assert list(tmp_path.iterdir()) == [two.path]
    two.close()
    assert not list(tmp_path.iterdir())
