"""Operators are tried once for each kind of processor that this machine can stand for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

KINDS = ("avx2", "avx512-vnni")  # the second offers what the first does


def best() -> str:
    """What the operators use here; empty where they are not compiled, or there is nothing."""
    if importlib.util.find_spec("edge_memllm_kernels") is None:
        return ""
    import edge_memllm_kernels

    try:
        return edge_memllm_kernels.processor()
    except FileNotFoundError:
        return ""


@pytest.fixture(scope="module", params=KINDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Operators that are registered meanwhile are those for one kind of processor."""
    kind, here = request.param, best()
    if here not in KINDS or KINDS.index(kind) > KINDS.index(here):
        pytest.skip(f"needs the compiled operators, and a processor with {kind}")
    import edge_memllm_kernels
    from support.operators import registered

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(edge_memllm_kernels.LIMIT_VARIABLE, kind)
        assert edge_memllm_kernels.processor() == kind
        yield kind
    registered()  # for tests of other files, in this process
