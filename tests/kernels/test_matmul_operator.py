"""MatMulNBits of edge-memllm-kernels against float64, and against itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.operators import Array, Operator

STEPS = {8: 127, 15: 16256}  # to which the inputs of a block are rounded, of its largest
BLOCKS = (16, 32, 64, 128, 256)

pytestmark = pytest.mark.usefixtures("kernels")


@dataclass(frozen=True)
class Case:
    """A matrix, and how many rows it is multiplied with."""

    bits: int
    block: int
    given: int
    n: int
    zeros: str = "none"
    half: bool = True
    group: int = 0
    copies: int = 0
    rows: int = 1
    seed: int = 0
    input_bits: int = 15

    @property
    def k(self) -> int:
        return self.given + (self.given // self.group * self.copies if self.group else 0)

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)

    def weights(self) -> dict[str, Array]:
        random = np.random.default_rng(self.seed)
        shape = (self.n, self.blocks, self.block * self.bits // 8)
        scales = random.uniform(0.01, 0.1, (self.n, self.blocks))
        made: dict[str, Array] = {
            "codes": random.integers(0, 256, shape, np.uint8),
            "scales": scales.astype(np.float16 if self.half else np.float32),
        }
        if self.zeros != "none":
            width = -(-self.blocks * self.bits // 8)
            rows = 1 if self.zeros == "same" else self.n
            zeros = random.integers(0, 256, (rows, width), np.uint8)
            made["zeros"] = np.broadcast_to(zeros, (self.n, width)).copy()
        return made

    def x(self) -> Array:
        random = np.random.default_rng(self.seed + 1)
        sizes = np.exp(2 * random.standard_normal((self.rows, self.given)))
        x = random.standard_normal((self.rows, self.given)) * sizes
        return np.asarray(x * (random.random(x.shape) < 0.9), np.float32)

    def operator(self, gate: int = 0, threads: int = 1) -> Operator:
        return operator(self.weights(), self.attributes() | {"gate": gate}, threads)

    def attributes(self) -> dict[str, int]:
        own = {"bits": self.bits, "block_size": self.block, "input_bits": self.input_bits}
        return {"K": self.k, "N": self.n, "group": self.group, "copies": self.copies, **own}

    def extended(self, x: Array) -> Array:
        """With the sums of groups behind, which are of float32 and go from the first on."""
        if not self.group:
            return x
        sums = np.zeros((len(x), self.given // self.group), np.float32)
        for i in range(self.group):
            sums += x[:, i :: self.group]
        return np.concatenate([x, *[sums] * self.copies], 1)

    def expected(self, x: Array) -> tuple[Array, Array]:
        """The product in float64, and how far from it a result may be."""
        weights = self.weights()
        codes = split(weights["codes"].reshape(self.n, -1), self.bits)
        codes = codes.reshape(self.n, self.blocks, self.block)
        zeros = np.full((self.n, self.blocks), 2 ** (self.bits - 1), np.float64)
        if self.zeros != "none":
            zeros = split(weights["zeros"], self.bits)[:, : self.blocks]
        scales = weights["scales"].astype(np.float64)[..., None]
        x = np.pad(self.extended(x), ((0, 0), (0, self.blocks * self.block - self.k)))
        x = x.astype(np.float64).reshape(len(x), self.blocks, self.block)
        largest = np.broadcast_to(abs(x).max(2, keepdims=True), x.shape)
        exact = np.einsum("nbi,mbi->mn", (codes - zeros[..., None]) * scales, x)
        rounding = np.einsum("nbi,mbi->mn", abs(codes - zeros[..., None]) * scales, largest)
        # Of what is added in float32, codes and codes of zero may stand in different lanes.
        adding = np.einsum("nbi,mbi->mn", (codes + zeros[..., None]) * scales, largest)
        return exact, rounding * (0.5001 / STEPS[self.input_bits]) + adding * 2.0**-22


def split(codes: Array, bits: int) -> Array:
    """The codes of bytes, the low half first."""
    if bits == 8:
        return codes.astype(np.float64)
    return np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).astype(np.float64)


def operator(weights: dict[str, Array], attributes: dict[str, int], threads: int = 1) -> Operator:
    given, outputs = {"x": np.float32}, {"y": np.float32}
    inputs = ["x", *weights]
    kept: dict[str, Any] = dict(attributes)
    return Operator(
        "MatMulNBits", inputs, outputs, given=given, constants=weights, threads=threads, **kept
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    group = draw(st.sampled_from([0, 0, 16, 32]))
    return Case(
        bits=draw(st.sampled_from([4, 8])),
        block=draw(st.sampled_from(BLOCKS)),
        given=draw(st.integers(1, 20)) * group if group else draw(st.integers(1, 700)),
        n=draw(st.integers(1, 45)),
        zeros=draw(st.sampled_from(["none", "same", "rows"])),
        half=draw(st.booleans()),
        group=group,
        copies=draw(st.integers(1, 3)) if group else 0,
        rows=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 1000)),
        input_bits=draw(st.sampled_from([8, 15])),
    )


@given(cases())
@settings(max_examples=300, deadline=None)
def test_a_product_is_as_exact_as_its_inputs_are_rounded(case: Case) -> None:
    x = case.x()
    (y,) = case.operator()(x=x)
    expected, bound = case.expected(x)
    assert (abs(y - expected) <= bound).all()


@given(cases(), st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_row_does_not_depend_on_those_beside_it(case: Case, cuts: list[int]) -> None:
    x, product = case.x(), case.operator()
    parts = [product(x=part)[0] for part in np.split(x, sorted(min(i, len(x)) for i in cuts))]
    np.testing.assert_array_equal(np.concatenate(parts), product(x=x)[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("zeros", ["none", "rows"])
def test_threads_change_nothing(bits: int, block: int, zeros: str) -> None:
    case = Case(bits, block, given=600, n=203, zeros=zeros, rows=37)
    one, three = (case.operator(threads=threads)(x=case.x())[0] for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def activated(gate: int, x: Array) -> Array:
    """SiLU, or GELU with tanh: of small ones it is x e^z, as exact as float32 holds z."""
    z = np.sqrt(8 / np.pi) * (x + 0.044715 * x**3) if gate == 2 else x
    return np.asarray(x / (1 + np.exp(-np.maximum(z, -700))))


@pytest.mark.parametrize(("gate", "bound"), [(1, 2e-6), (2, 4e-5)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("half_n", [1, 7, 16, 45, 80])
def test_a_gate_is_of_the_halves_of_a_product(
    gate: int, bound: float, threads: int, half_n: int
) -> None:
    case = Case(4, 32, given=96, n=2 * half_n, zeros="rows", rows=21)
    x = case.x() * np.float32(0.2)
    a, b = np.split(case.operator()(x=x)[0].astype(np.float64), 2, axis=1)
    (y,) = case.operator(gate, threads)(x=x)
    np.testing.assert_allclose(y, activated(gate, a) * b, rtol=bound, atol=1e-12)


def test_zero_points_may_come_while_it_runs() -> None:
    case = Case(4, 32, given=100, n=9, zeros="rows", rows=3)
    weights = case.weights()
    inputs, given = ["x", *weights], {"x": np.float32, "zeros": np.uint8}
    constants = {key: each for key, each in weights.items() if key != "zeros"}
    kept: dict[str, Any] = case.attributes() | {"gate": 0}
    later = Operator(
        "MatMulNBits", inputs, {"y": np.float32}, given=given, constants=constants, **kept
    )
    (expected,) = case.operator()(x=case.x())
    np.testing.assert_array_equal(later(x=case.x(), zeros=weights["zeros"])[0], expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5, 15, 33])
def test_what_is_no_number_is_not_hidden(bits: int, bad: float, at: int) -> None:
    case = Case(bits, 16, given=40, n=5, rows=3)
    product, x = case.operator(), case.x()
    (fine,) = product(x=x)
    x[1, at] = bad
    (y,) = product(x=x)
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(y[::2], fine[::2])


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_numbers_below_1e_34_are_blocks_of_zeros(bits: int) -> None:
    case = Case(bits, 32, given=64, n=5)
    (y,) = case.operator()(x=np.full((1, 64), 1e-36, np.float32))
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "takes 4 or 8 bits in blocks of"),
        ({"block_size": 48}, "takes 4 or 8 bits in blocks of"),
        ({"N": 0}, "takes 4 or 8 bits in blocks of"),
        ({"gate": 3}, "no such gate"),
        ({"gate": 1}, "no such gate"),  # of an odd number of outputs
        ({"group": 7, "copies": 2}, "K is no number of inputs with their sums"),
        ({"K": -1}, "an attribute is out of range"),
    ],
)
def test_other_attributes_are_refused(changed: dict[str, int], message: str) -> None:
    case = Case(4, 32, given=96, n=5)
    with pytest.raises(Exception, match=message):
        operator(case.weights(), case.attributes() | {"gate": 0} | changed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("codes", "B has another size"),
        ("scales", "scales has another size or type"),
        ("zeros", "zero_points has another size"),
    ],
)
def test_weights_of_another_size_are_refused(name: str, message: str) -> None:
    case = Case(4, 32, given=96, n=5, zeros="rows")
    weights = case.weights()
    weights[name] = weights[name][:-1]
    with pytest.raises(Exception, match=message):
        operator(weights, case.attributes() | {"gate": 0})(x=case.x())


def test_inputs_of_another_size_are_refused() -> None:
    with pytest.raises(Exception, match="A has another size"):
        Case(4, 32, given=96, n=5).operator()(x=np.zeros((2, 95), np.float32))


def test_no_rows_give_no_rows() -> None:
    (y,) = Case(4, 32, given=96, n=5).operator()(x=np.zeros((2, 0, 96), np.float32))
    assert y.shape == (2, 0, 5)
