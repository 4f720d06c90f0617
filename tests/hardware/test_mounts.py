from pathlib import Path

from lightning_largescale.hardware.mounts import Mount, mounts


def write(root: Path, text: str) -> Path:
    path = root / "proc/self/mountinfo"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return root


def test_reads_a_line_with_optional_fields_and_escapes(tmp_path):
    line = r"36 35 98:0 /sub\040dir /mnt/my\040disk rw,noatime shared:1 master:2 - ext4 /dev/sd\134a rw,errors=continue"
    assert mounts(write(tmp_path, line + "\n")) == [
        Mount(
            device="98:0",
            root="/sub dir",
            point="/mnt/my disk",
            filesystem="ext4",
            source="/dev/sd\\a",
            options=("rw", "noatime", "rw", "errors=continue"),
        )
    ]


def test_option_values(tmp_path):
    (mount,) = mounts(write(tmp_path, "1 0 0:9 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u/d=1\n"))
    assert mount.option("upperdir") == "/u/d=1"
    assert mount.option("workdir") is None


def test_lines_of_another_form_are_passed_over(tmp_path):
    assert mounts(write(tmp_path, "nonsense\n\n1 0 0:9 / / rw - tmpfs\n")) == []


def test_no_such_list(tmp_path):
    assert mounts(tmp_path) == []


def test_this_machine_has_a_root():
    assert any(mount.point == "/" for mount in mounts())
