"""The compiled convolutions of any channels, groups and windows; every instruction set by test_native_backend.py."""

import hypothesis
import hypothesis.strategies as st
import pytest
from test_native_convolution import BOTH, Case, Shape, assert_close

pytestmark = pytest.mark.usefixtures("native")


@st.composite
def any_windows(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """The kernel, x's size, stride, padding and dilation, rows and columns each by themselves."""
    drawn = []
    for _ in range(2):
        kernel, stride, padding, dilation = (draw(st.integers(*ends)) for ends in ((1, 5), (1, 3), (0, 3), (1, 2)))
        reach = dilation * (kernel - 1) + 1
        drawn.append((kernel, draw(st.integers(max(1, reach - 2 * padding), 33)), stride, padding, dilation))
    return tuple(zip(*drawn, strict=True))


CHANNELS = st.integers(1, 70)
whatever_it_thinks_of = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


@whatever_it_thinks_of
@hypothesis.given(any_windows(), CHANNELS, CHANNELS, st.integers(1, 3), st.integers(1, 3), st.sampled_from(BOTH))
def test_any_channels_and_any_windows_are_the_formula_in_fp64(windows, inputs, outputs, groups, images, dtype):
    shape = Shape(inputs * groups, outputs * groups, *windows, groups=groups, images=images)
    case = Case(shape, 0, act=1, residual=True, dtype=dtype, scale=True)
    assert_close(case.found(), case.expected(), case)


@whatever_it_thinks_of
@hypothesis.given(any_windows(), st.sampled_from((2, 4, 8)), CHANNELS, st.integers(1, 3), st.sampled_from(BOTH))
def test_any_groups_of_few_channels_are_the_formula_in_fp64(windows, channels, groups, images, dtype):
    shape = Shape(channels * groups, channels * groups, *windows, groups=groups, images=images)
    case = Case(shape, 0, act=1, residual=True, dtype=dtype, scale=True)
    assert_close(case.found(), case.expected(), case)


@whatever_it_thinks_of
@hypothesis.given(
    any_windows(), CHANNELS, CHANNELS, st.sampled_from((2, 4, 7)), st.integers(1, 3), st.sampled_from(BOTH)
)
def test_winograds_form_of_any_size_is_the_formula_in_fp64(windows, inputs, outputs, tile, images, dtype):
    _, size, _, padding, _ = windows
    hypothesis.assume(all(side + 2 * pad >= 3 for side, pad in zip(size, padding, strict=True)))
    case = Case(Shape(inputs, outputs, size=size, padding=padding, images=images, tile=tile), 0, dtype=dtype)
    assert_close(case.found(), case.expected(), case)
