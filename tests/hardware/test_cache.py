import json
import logging
import os
from pathlib import Path

import pytest

from lightning_largescale.hardware import Link, Rates
from lightning_largescale.hardware.cache import KEPT_SECONDS, cache_file, cache_folder, load_rates, store_rates

MACHINE = {"cpu": "one", "sizes": [[1, 2, 3]], "backend": None}
RATES = Rates(
    matmul={"float32": 1e9}, memory_bandwidth=1e9, all_gather=Link(latency_seconds=1e-6, bandwidth=1e8), disk_read=1.5
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LARGESCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_kept_and_found_again(folder):
    assert load_rates(MACHINE) is None
    store_rates(MACHINE, RATES)
    assert load_rates(MACHINE) == RATES
    assert load_rates({**MACHINE, "cpu": "another"}) is None
    assert [path.suffix for path in folder.iterdir()] == [".json"]  # nothing half written is left


def change(**fields):
    path = cache_file(MACHINE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"measured_at": 0},
        {"measured_at": 1e12},  # of the future: a clock was wrong
        {"measured_at": "yesterday"},
        {"measured_at": None},
        {"fingerprint": {"cpu": "another"}},
        {"rates": {"matmul": {}}},
        {"rates": None},
    ],
)
def test_stale_or_damaged_is_measured_again(fields):
    store_rates(MACHINE, RATES)
    change(**fields)
    assert load_rates(MACHINE) is None


def test_thirty_days(monkeypatch):
    store_rates(MACHINE, RATES)
    measured_at = json.loads(cache_file(MACHINE).read_text())["measured_at"]
    change(measured_at=measured_at - KEPT_SECONDS + 60)
    assert load_rates(MACHINE) == RATES
    change(measured_at=measured_at - KEPT_SECONDS - 60)
    assert load_rates(MACHINE) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\x00"])
def test_a_damaged_file_is_told_and_replaced(content, caplog):
    store_rates(MACHINE, RATES)
    cache_file(MACHINE).write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert load_rates(MACHINE) is None
    assert "measuring again" in caplog.text
    store_rates(MACHINE, RATES)
    assert load_rates(MACHINE) == RATES


def test_a_folder_that_cannot_be_is_only_logged(folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        store_rates(MACHINE, RATES)
    assert "are not kept" in caplog.text
    assert load_rates(MACHINE) is None


def test_where_it_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LARGESCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/lightning_largescale"
    home = Path(os.path.expanduser("~/.cache/lightning_largescale"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == home
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == home
