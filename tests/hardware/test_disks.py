import os
from pathlib import Path

import pytest
from mounting import mounted_tmpfs

from lightning_largescale.hardware.disks import direct_file, disks, over_network, refusal, refused_folder
from lightning_largescale.hardware.mounts import Mount


def mount(filesystem="ext4", *, source="/dev/sda1", point="/data", options=("rw",)):
    return Mount(device="8:1", root="/", point=point, filesystem=filesystem, source=source, options=options)


def lay_out(root: Path, *lines: str) -> Path:
    path = root / "proc/self/mountinfo"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return root


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs", "zfs", "f2fs"])
def test_local_disks_are_accepted(filesystem):
    assert refusal(mount(filesystem), []) is None


@pytest.mark.parametrize(
    ("filesystem", "reason"),
    [
        ("tmpfs", "tmpfs keeps files in memory"),
        ("ramfs", "ramfs keeps files in memory"),
        ("nfs4", "nfs4 is reached over the network"),
        ("cifs", "cifs is reached over the network"),
        ("lustre", "lustre is reached over the network"),
        ("fuse.sshfs", "fuse.sshfs is reached over the network"),
        ("fuse.s3fs", "fuse.s3fs is reached over the network"),
        ("fuse.mergerfs", "fuse.mergerfs is served by another process"),
        ("fuseblk", "fuseblk is served by another process"),
        ("virtiofs", "virtiofs is a share of the host, not a disk of this machine"),
        ("vfat", "a file on vfat ends at 4 GiB"),
    ],
)
def test_others_are_refused_in_words(filesystem, reason):
    assert refusal(mount(filesystem), []) == reason


def test_a_disk_in_memory_is_refused():
    assert refusal(mount("ext4", source="/dev/zram0"), []) == "/dev/zram0 keeps files in memory"


def test_an_overlay_is_what_it_writes_to(tmp_path):
    upper = tmp_path / "upper"
    upper.mkdir()
    overlay = mount("overlay", point="/", source="overlay", options=("rw", f"upperdir={upper}"))
    below = {kind: mount(kind, point=str(tmp_path)) for kind in ("tmpfs", "ext4")}
    assert refusal(overlay, [overlay, below["ext4"]]) is None
    assert refusal(overlay, [overlay, below["tmpfs"]]) == (
        "what overlay writes goes to another file system, and tmpfs keeps files in memory"
    )
    # In a container the folder is one of the host's and cannot be seen: the probe decides.
    hidden = mount("overlay", point="/", source="overlay", options=("rw", "upperdir=/var/lib/none/diff"))
    assert refusal(hidden, [hidden]) is None


def test_finds_ours_and_passes_over_the_systems(tmp_path):
    places = {name: tmp_path / name for name in ("nfs", "disk", "again", "readonly", "hidden")}
    for place in places.values():
        place.mkdir()
    root = lay_out(
        tmp_path / "root",
        "21 1 0:21 / /proc rw - proc proc rw",
        "22 1 0:22 / /run rw - tmpfs tmpfs rw",
        f"23 1 0:23 / {places['nfs']} rw - nfs4 server:/home rw",
        f"24 1 0:24 / {places['hidden']} rw - tmpfs tmpfs rw",
        f"25 1 8:1 / {places['disk']} rw - ext4 /dev/sda1 rw",
        f"26 1 8:1 /sub {places['again']} rw - ext4 /dev/sda1 rw",
        f"27 1 8:2 / {places['readonly']} ro - ext4 /dev/sdb1 rw",
        f"28 1 8:3 / {places['hidden']} rw - tmpfs tmpfs rw",
        f"29 1 8:4 / {tmp_path}/gone rw - ext4 /dev/sdc1 rw",
    )
    found = {disk.path: disk for disk in disks(root)}
    assert set(found) == {str(places["disk"]), str(places["nfs"]), str(places["hidden"])}
    assert found[str(places["nfs"])].refused == "nfs4 is reached over the network"
    assert found[str(places["disk"])].free_bytes > 0
    assert not any(list(place.iterdir()) for place in places.values())  # probing leaves nothing behind


@pytest.mark.parametrize(
    ("filesystem", "reason", "network"),
    [
        ("ext4", None, False),
        ("nfs4", "nfs4 is reached over the network", True),
        ("tmpfs", "tmpfs keeps files in memory", False),
        ("fuse.s3fs", "fuse.s3fs is reached over the network", True),
        ("unheardof", None, False),
    ],
)
def test_a_folder_is_what_its_mount_is(tmp_path, filesystem, reason, network):
    folder = tmp_path / "mounted/below"
    folder.mkdir(parents=True)
    root = lay_out(
        tmp_path / "root",
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw",
        f"22 1 0:22 / {tmp_path}/mounted rw - {filesystem} source rw",
    )
    assert refused_folder(folder, root) == reason
    assert over_network(folder, root) is network
    assert refused_folder(tmp_path, root) is None
    # What a link leads to counts.
    (tmp_path / "link").symlink_to(folder)
    assert refused_folder(str(tmp_path / "link"), root) == reason


def test_a_folder_on_an_overlay_is_what_the_overlay_writes_to(tmp_path):
    (tmp_path / "upper").mkdir()
    root = lay_out(
        tmp_path / "root",
        f"21 1 0:21 / / rw - overlay overlay rw,upperdir={tmp_path}/upper",
        f"22 1 0:22 / {tmp_path}/upper rw - nfs4 server:/home rw",
    )
    assert (
        refused_folder("/", root)
        == "what overlay writes goes to another file system, and nfs4 is reached over the network"
    )
    assert over_network("/", root)


def test_no_list_of_mounts_refuses_no_folder(tmp_path):
    assert refused_folder(tmp_path, tmp_path) is None
    assert not over_network(tmp_path, tmp_path)


def test_no_list_of_mounts_no_disks(tmp_path):
    assert disks(tmp_path) == ()


def test_accepted_come_first_by_free_bytes():
    found = disks()
    order = [(disk.refused is not None, -disk.free_bytes) for disk in found]
    assert order == sorted(order)
    for disk in found:
        if disk.refused is None:
            with direct_file(disk.path):
                pass


def test_a_direct_file_has_no_name_and_is_gone_when_closed(tmp_path):
    try:
        with direct_file(tmp_path) as descriptor:
            assert list(tmp_path.iterdir()) == []
            assert os.fstat(descriptor).st_nlink == 0
    except OSError as error:
        pytest.skip(f"no O_DIRECT below the temporary folder: {error}")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_direct_file_in_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError), direct_file(tmp_path / "none"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_real_tmpfs_is_refused(tmp_path):
    with mounted_tmpfs(tmp_path):
        disk = next(disk for disk in disks() if disk.path == str(tmp_path))
        assert disk.refused == "tmpfs keeps files in memory"
        assert 0 < disk.free_bytes <= 2**20
