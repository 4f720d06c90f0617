import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_largescale.errors import PlanError
from lightning_largescale.units import format_bytes, format_flops, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1),
        (1.5e9, 1_500_000_000),
        ("6GiB", 6 * 2**30),
        ("512 MB", 512 * 10**6),
        ("1.5gib", 3 * 2**29),
        ("100", 100),
        ("2k", 2000),
    ],
)
def test_parse(given, expected):
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    "given", [0, 0.5, "0.1B", "0.0004 K", -1, "", "GiB", "6 elephants", None, True, float("nan"), float("inf"), "6iB"]
)
def test_no_size(given):
    with pytest.raises(PlanError, match=r"memory_budget=.* is no size"):
        parse_bytes(given, name="memory_budget")


def test_format():
    assert [format_bytes(x) for x in (0, 1023, 1024, 3 * 2**29, -(2**30), 2**60)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 GiB",
        "-1.00 GiB",
        "1024 PiB",
    ]
    assert [format_seconds(x) for x in (0, 1e-9, 8.3e-4, 0.0123, 1.25, 185)] == [
        "0 s",
        "0.00 us",
        "830 us",
        "12.3 ms",
        "1.25 s",
        "3 min 5 s",
    ]
    assert format_flops(44e9) == "44.0 GFLOP/s"


@given(st.integers(1, 2**50))
def test_rounded_up_is_enough(count):
    written = format_bytes(count, up=True)
    assert count <= parse_bytes(written) <= 1.01 * count + 1
    assert format_bytes(3 * 2**29 + 1, up=True) == "1.51 GiB"
