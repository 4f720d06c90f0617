from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_largescale.offload import pages
from lightning_largescale.offload.pages import ParamEntry, bundles_of
from lightning_largescale.optimizers.state_spec import StateSpec
from lightning_largescale.tiers import ALIGNMENT_BYTES

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.uint8]


@st.composite
def entries(draw):
    """Parameters of all sizes around what a page holds, in groups and blocks."""
    found = []
    specs = [
        StateSpec(
            draw(st.booleans()), dict(zip("abc", draw(st.lists(st.sampled_from(DTYPES), max_size=3)), strict=False))
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    for _ in range(draw(st.integers(0, 12))):
        shape = draw(
            st.one_of(
                st.just(()),
                st.tuples(st.integers(0, 5), st.integers(0, 200)),
                st.tuples(st.sampled_from([1, 4095, 4096, 4097, 8192, 30_001])),
            )
        )
        parameter = torch.empty(shape, dtype=draw(st.sampled_from(DTYPES[:3])))
        spec, group, label = draw(st.sampled_from(specs)), draw(st.integers(0, 1)), draw(st.sampled_from(["", "0"]))
        found.append(ParamEntry(parameter, group, spec, label))
    return found


def moved(entry):
    """As if the parameters of a block were elsewhere too."""
    return entry.local.element_size() if entry.label else 0


@settings(max_examples=100)
@given(entries(), st.sampled_from([ALIGNMENT_BYTES, 64 * 1024, 2**20]))
def test_every_element_is_in_one_page_of_its_kind(entries, page_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PAGE_BYTES", page_bytes)
        bundles = list(bundles_of(entries, moved))
        for bundle in bundles:
            ours = bundle.entries
            assert len({(one.group, one.label, one.local.dtype, moved(one)) for one in ours}) == 1
            assert len({(one.spec.elementwise, *one.spec.dtypes.items()) for one in ours}) == 1
        found = {id(entry): [] for entry in entries}
        for bundle in bundles:
            per_element = moved(bundle.entries[0]) + bundle.entries[0].spec.bytes_per_element
            cut = list(bundle.pages(moved(bundle.entries[0])))
            assert [page.start for page in cut[1:]] == [page.stop for page in cut[:-1]]
            for page in cut:
                assert page.slices
                check_size(page, per_element, page_bytes)
                for span in page.slices:
                    assert page.start <= span.at <= span.at + span.stop - span.start <= page.stop
                    assert span.whole or len(page.bundle.entries) == 1
                    found[id(span.entry)] += range(span.start, span.stop)
    assert {key: len(elements) for key, elements in found.items()} == {id(one): one.local.numel() for one in entries}
    assert all(elements == list(range(len(elements))) for elements in found.values())


def check_size(page, per_element, page_bytes):
    entries, keys = page.bundle.entries, len(page.bundle.dtypes)
    if len(entries) == 1 and (not entries[0].spec.elementwise or page.stop - page.start <= 4096):
        return
    # What is rounded up: the elements of each parameter to 64, the state under each key to what a request takes.
    rounding = 64 * len(entries) * max(1, per_element) + keys * ALIGNMENT_BYTES
    assert (page.stop - page.start) * per_element <= page_bytes + rounding
    assert page.state_bytes <= page_bytes + rounding


@settings(max_examples=100)
@given(entries(), st.sampled_from([ALIGNMENT_BYTES, 64 * 1024]))
def test_the_state_of_pages_is_aligned_and_apart(entries, page_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PAGE_BYTES", page_bytes)
        for bundle in bundles_of(entries):
            cut = list(bundle.pages(0))
            stretches = sorted(bundle.stretch(key, one.start, one.stop) for one in cut for key in bundle.dtypes)
            assert all(number % ALIGNMENT_BYTES == 0 for stretch in stretches for number in stretch)
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(stretches))
            assert all(0 <= start <= stop <= bundle.nbytes for start, stop in stretches)
            # With what is rounded up, they are all of it.
            assert (
                sum(stop - start for start, stop in stretches) == bundle.nbytes == sum(one.state_bytes for one in cut)
            )


@given(entries())
def test_the_state_of_each_parameter_has_bytes_of_its_own(entries):
    for bundle in bundles_of(entries):
        assume(bundle.dtypes)
        spans = sorted(
            (start, start + entry.local.numel() * dtype.itemsize, dtype.itemsize)
            for entry in bundle.entries
            for key, dtype in bundle.dtypes.items()
            for start in [bundle.start_of(entry, key)]
        )
        assert all(start % 64 == 0 for start, _, _ in spans)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
        assert spans[-1][1] <= bundle.nbytes


def test_parameters_without_state_that_are_elsewhere_make_no_large_page():
    count = 4 * pages.PAGE_BYTES // 4
    found = [ParamEntry(torch.empty(count // 64, device="meta"), 0, StateSpec(True)) for _ in range(64)]
    sizes = [sum(one.local.nbytes for one in bundle.entries) for bundle in bundles_of(found, lambda entry: 4)]
    assert max(sizes) <= pages.PAGE_BYTES
    assert len(sizes) == 4
