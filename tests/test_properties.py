"""Whatever shape, layout and form hypothesis thinks of, on the Python kernels."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import python_backend

from fusedres import numerics, testing
from fusedres.epilogue import CATALOGUE


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7)),
    layout=st.sampled_from(testing.LAYOUTS),
    dtype=st.sampled_from(testing.DTYPES),
    op=st.sampled_from(["bn_act", "affine_act"]),
    residual=st.sampled_from(testing.RESIDUALS),
    gate=st.sampled_from(testing.GATES),
    act=st.sampled_from([row.name for row in CATALOGUE]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_layout_and_form_is_within_the_bar(shape, layout, dtype, op, residual, gate, act, seed) -> None:
    mode = "training" if op == "bn_act" and shape[0] * shape[2] * shape[3] > 1 else "eval"
    case = testing.Case(op, dtype, layout, shape, "normal", mode, residual, gate, act, "all", seed)
    with python_backend.registered():
        assert not [row for row in numerics.compare(case) if row.fails_alone()]
