"""What a form is expected to cost, against what its codes do cost."""

from __future__ import annotations

import numpy as np
import pytest

from edge_memllm.arrays import Floats
from edge_memllm.errors import ExportError
from edge_memllm_export.weights.forms import MatrixForm, WeighedMatrix
from edge_memllm_export.weights.planning import FORMS

FLOAT16 = np.dtype(np.float16)
EXACT = [MatrixForm(8, 32, level=0), MatrixForm(4, 64, level=0)]


@pytest.fixture(params=[96, 72], ids=["whole blocks", "a block that is filled up"])
def matrix(request: pytest.FixtureRequest, random: np.random.Generator) -> WeighedMatrix:
    columns = request.param
    mixing = random.standard_normal((columns, columns)) * np.exp(random.standard_normal(columns))
    x = (random.standard_normal((400, columns)) @ mixing).astype(np.float32)
    weight = random.standard_normal((80, columns)).astype(np.float32)
    shares = random.random(80).astype(np.float32)
    return WeighedMatrix(weight, x.T @ x / np.float32(len(x)), shares / shares.sum())


def damage(matrix: WeighedMatrix, found: Floats) -> float:
    missed = (found - matrix.weight).astype(np.float64)
    rows = np.einsum("nk,kj,nj->n", missed, matrix._moment.astype(np.float64), missed)
    return float(matrix._shares @ rows) / 2


@pytest.mark.parametrize("form", [*FORMS, *EXACT], ids=str)
def test_what_a_form_costs_is_known_before(matrix: WeighedMatrix, form: MatrixForm) -> None:
    expected = matrix.measured_share(form) * matrix.expected(form)
    found = matrix.stored(form, FLOAT16, "w")
    assert damage(matrix, found.weights()) == pytest.approx(expected, rel=0.35)
    assert found.level == form.level


@pytest.mark.parametrize("form", [*FORMS, *EXACT], ids=str)
def test_a_form_takes_the_bytes_that_it_says(matrix: WeighedMatrix, form: MatrixForm) -> None:
    rows, columns = matrix.weight.shape
    assert matrix.stored(form, FLOAT16, "w").nbytes == form.stored_bytes(rows, columns)


def test_no_weight_is_off_by_more_than_feedback_moves_it(matrix: WeighedMatrix) -> None:
    """Of 8 bits a few steps, however large the columns' inputs are."""
    found = matrix.stored(MatrixForm(8, 32), FLOAT16, "w").weights()
    assert np.abs(found - matrix.weight).max() <= 0.2 * np.abs(matrix.weight).max()


def test_the_more_bits_the_less_damage(matrix: WeighedMatrix) -> None:
    damages = [
        damage(matrix, matrix.stored(MatrixForm(bits, 32), FLOAT16, "w").weights())
        for bits in (2, 4, 6, 8)
    ]
    assert damages[0] > 4 * damages[1] > 16 * damages[2] > 64 * damages[3] > 0


def test_scales_that_float16_does_not_hold_are_refused(matrix: WeighedMatrix) -> None:
    large = WeighedMatrix(matrix.weight * np.float32(1e7), matrix._moment, matrix._shares)
    with pytest.raises(ExportError, match="head: a weight between rows 0 and 80 is not finite or"):
        large.stored(MatrixForm(4, 32), FLOAT16, "head")


def test_a_matrix_without_inputs_has_no_damage() -> None:
    matrix = WeighedMatrix(
        np.ones((4, 32), np.float32), np.zeros((32, 32), np.float32), np.full(4, 0.25, np.float32)
    )
    assert matrix.measured_share() * matrix.expected(MatrixForm(4, 32)) == 0
    np.testing.assert_allclose(matrix.stored(MatrixForm(8, 32), FLOAT16, "w").weights(), 1, 0.01)
