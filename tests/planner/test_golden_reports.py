"""Reports of searches as they were before the planner was rebuilt: plans, bytes, seconds, words."""

from __future__ import annotations

import pytest
from planner import golden_reports

CASES = {golden_reports.name_of(case): case for case in golden_reports.CASES}


def test_there_are_enough():
    assert len(CASES) == len(golden_reports.CASES) >= 30
    assert {path.name for path in golden_reports.FOLDER.glob("*.json")} == {
        *CASES,
        *(f"{case.workload}.workload.json" for case in CASES.values()),
    }


@pytest.mark.parametrize("name", CASES)
def test_as_before(name):
    written = (golden_reports.FOLDER / name).read_text()
    assert golden_reports.text_of(golden_reports.report(CASES[name])) == written
