"""GroupQueryAttention of edge-memllm-kernels against float64, and against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.operators import Array, Operator

pytestmark = pytest.mark.usefixtures("kernels")


@dataclass(frozen=True)
class Case:
    """Texts with keys and values of before, and some new tokens of each."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    rotary: int = 0
    window: int = 0
    cap: float = 0.0
    dtype: Any = np.float16
    half_angles: bool = False
    packed: bool = True
    before: tuple[int, ...] = (0,)  # positions of each text that are in the cache
    tokens: int = 1
    room: int = 0  # that is left behind the longest text
    seed: int = 0

    @property
    def capacity(self) -> int:
        return max(self.before) + self.tokens + self.room

    @property
    def lengths(self) -> Array:
        return np.array([each + self.tokens for each in self.before], np.int32)

    @property
    def scale(self) -> float:
        return float(1 / np.sqrt(self.size))

    def operator(self, threads: int = 1) -> Operator:
        apart = ["", ""] if self.packed else ["k", "v"]
        angles = ["cos", "sin"] if self.rotary else []
        names = ["q", *apart, "past_k", "past_v", "last", "total", *angles]
        dtypes = dict.fromkeys(("q", "k", "v"), np.float32)
        dtypes |= {"past_k": self.dtype, "past_v": self.dtype}
        dtypes |= {"last": np.int32, "total": np.int32}
        dtypes |= dict.fromkeys(("cos", "sin"), np.float16 if self.half_angles else np.float32)
        return Operator(
            "GroupQueryAttention",
            names,
            {"out": np.float32, "new_k": self.dtype, "new_v": self.dtype},
            given={key: dtypes[key] for key in names if key},
            threads=threads,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=self.scale,
            softcap=self.cap,
            local_window_size=self.window,
            sliding_window_cache=0,
        )

    def feeds(self) -> dict[str, Array]:
        """The cache has what is no number where nothing was put yet."""
        random = np.random.default_rng(self.seed)
        batch, kept = len(self.before), self.kv_heads * self.size
        new = random.standard_normal((batch, self.tokens, self.heads * self.size + 2 * kept))
        new = (2 * new).astype(np.float32)
        past = random.standard_normal((2, batch, self.kv_heads, self.capacity, self.size))
        past = past.astype(self.dtype)
        for text, length in enumerate(self.before):
            past[:, text, :, length:] = np.nan
        feeds = {"past_k": past[0], "past_v": past[1], "last": self.lengths - 1}
        feeds["total"] = np.array(self.lengths.max(), np.int32)
        if self.packed:
            feeds["q"] = new
        else:
            feeds["q"], feeds["k"], feeds["v"] = np.split(new, [new.shape[2] - 2 * kept, -kept], 2)
        if self.rotary:
            angles = random.uniform(-4, 4, (self.capacity, self.rotary // 2))
            dtype = np.float16 if self.half_angles else np.float32
            feeds |= {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}
        return feeds

    def split(self, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
        """Queries, keys and values of new tokens: [batch, tokens, heads, size]."""
        kept = self.kv_heads * self.size
        parts = [feeds["q"], feeds.get("k"), feeds.get("v")]
        if self.packed:
            parts = np.split(feeds["q"], [self.heads * self.size, -kept], 2)
        q, k, v = (each.reshape(*each.shape[:2], -1, self.size).astype(float) for each in parts)
        return q, k, v

    def turned(self, x: Array, feeds: dict[str, Array], text: int) -> Array:
        if not self.rotary:
            return x
        at = slice(self.before[text], self.before[text] + self.tokens)
        cos, sin = (feeds[key][at, None].astype(float) for key in ("cos", "sin"))
        a, b, rest = np.split(x, [self.rotary // 2, self.rotary], 2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], 2)

    def sees(self, text: int) -> Array:
        """Whether a new token looks at a position: [tokens, length]."""
        own = self.before[text] + np.arange(self.tokens)[:, None]
        positions = np.arange(self.lengths[text])
        seen = positions <= own
        return np.asarray(seen & (positions > own - self.window) if self.window else seen)

    def expected(self, feeds: dict[str, Array], text: int, keys: Array, values: Array) -> Array:
        """Of one text over its keys and values as they are kept: [tokens, heads * size]."""
        queries = self.turned(self.split(feeds)[0][text], feeds, text)
        kept = (each[text, :, : self.lengths[text]].astype(float) for each in (keys, values))
        keys, values = (np.repeat(each, self.heads // self.kv_heads, 0) for each in kept)
        scores = np.einsum("thd,hpd->htp", queries, keys) * self.scale
        if self.cap:
            scores = self.cap * np.tanh(scores / self.cap)
        scores = np.where(self.sees(text), scores, -np.inf)
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        return np.einsum("htp,hpd->thd", weights, values).reshape(self.tokens, -1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 16)) * 16
    longest = draw(st.sampled_from([3, 70, 600]))
    return Case(
        heads=kv_heads * draw(st.integers(1, 7)),
        kv_heads=kv_heads,
        size=size,
        rotary=draw(st.sampled_from([0, size, size // 2, 2])),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 300])),
        cap=draw(st.sampled_from([0.0, 0.0, 3.0, 50.0])),
        dtype=draw(st.sampled_from([np.float16, np.float32])),
        half_angles=draw(st.booleans()),
        packed=draw(st.booleans()),
        before=tuple(draw(st.lists(st.integers(0, longest), min_size=1, max_size=3))),
        tokens=draw(st.sampled_from([1, 1, 2, 5, 16, 17, 33])),
        room=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 1000)),
    )


@given(cases())
@settings(max_examples=150, deadline=None)
def test_attention_is_that_of_the_definition(case: Case) -> None:
    feeds = case.feeds()
    out, keys, values = case.operator()(**feeds)
    for text in range(len(case.before)):
        assert abs(out[text] - case.expected(feeds, text, keys, values)).max() < 3e-5


@given(cases())
@settings(max_examples=50, deadline=None)
def test_new_keys_and_values_are_put_behind_those_of_before(case: Case) -> None:
    feeds = case.feeds()
    _, keys, values = case.operator()(**feeds)
    _, new_keys, new_values = case.split(feeds)
    for text, (start, end) in enumerate(zip(case.before, case.lengths, strict=True)):
        put = new_values[text].swapaxes(0, 1).astype(np.float32).astype(case.dtype)
        np.testing.assert_array_equal(values[text, :, start:end], put)
        turned = case.turned(new_keys[text], feeds, text).swapaxes(0, 1)
        bound = abs(turned) * 2.0**-11 + 1e-6 if case.dtype is np.float16 else 1e-6
        assert (abs(keys[text, :, start:end] - turned) <= bound).all()
        for now, past in ((keys, feeds["past_k"]), (values, feeds["past_v"])):
            np.testing.assert_array_equal(now[text, :, :start], past[text, :, :start])
            assert np.isnan(now[text, :, end:]).all()


def by_chunks(case: Case, feeds: dict[str, Array], chunks: list[int]) -> Array:
    """The tokens of a case with nothing before, some at a time."""
    operator, found, start = case.operator(), [], 0
    now = dict(feeds)
    for count in chunks:
        part = slice(start, start + count)
        now |= {key: feeds[key][:, part] for key in ("q", "k", "v") if key in feeds}
        start += count
        last = np.full(len(case.before), start - 1, np.int32)
        out, keys, values = operator(**now | {"last": last, "total": np.array(start, np.int32)})
        now |= {"past_k": keys, "past_v": values}
        found.append(out)
    return np.concatenate(found, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (7, 1, 48), (4, 4, 128)])
@pytest.mark.parametrize("window", [0, 50, 300])
def test_a_token_does_not_depend_on_those_it_comes_with(
    dtype: Any, heads: int, kv_heads: int, size: int, window: int
) -> None:
    case = Case(heads, kv_heads, size, size, window, dtype=dtype, tokens=560, before=(0,))
    chunks = [1, 2, 3, 60, 1, 190, 1, 1, 16, 17, 20, 243, 5]
    feeds = case.feeds()
    np.testing.assert_array_equal(by_chunks(case, feeds, chunks), case.operator()(**feeds)[0])


@given(cases())
@settings(max_examples=60, deadline=None)
def test_a_text_does_not_depend_on_those_it_comes_with(case: Case) -> None:
    feeds = case.feeds()
    together = case.operator()(**feeds)
    for text, before in enumerate(case.before):
        alone = {**feeds, "total": np.array(case.lengths[text])}
        for key in ("q", "k", "v", "past_k", "past_v", "last"):
            if key in feeds:
                alone[key] = feeds[key][text : text + 1]
        found = replace(case, before=(before,)).operator()(**alone)
        for each, of_all in zip(found, together, strict=True):
            np.testing.assert_array_equal(each[0], of_all[text])


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_threads_change_nothing(tokens: int, dtype: Any) -> None:
    case = Case(9, 3, 64, 64, dtype=dtype, before=(700, 3), tokens=tokens)
    one, three = (case.operator(threads)(**case.feeds()) for threads in (1, 3))
    for each, other in zip(one, three, strict=True):
        np.testing.assert_array_equal(each, other)


@pytest.mark.parametrize("name", ["past_k", "past_v"])
@pytest.mark.parametrize("at", [0, 63, 64, 100, 299])
def test_what_is_no_number_is_not_hidden(name: str, at: int) -> None:
    case = Case(4, 2, 32, before=(300,), tokens=1)
    feeds = case.feeds()
    feeds[name][0, 1, at] = np.nan
    out = case.operator()(**feeds)[0].reshape(4, 32)
    assert np.isnan(out[2:]).all()
    assert np.isfinite(out[:2]).all()


@pytest.mark.parametrize("at", [0, 63])
def test_a_score_that_is_none_is_not_hidden_where_it_is_the_only_one(at: int) -> None:
    case = Case(1, 1, 16, window=2, before=(63 + at,), tokens=1)
    feeds = case.feeds()
    feeds["past_k"][0, 0, 62 + at] = np.nan
    assert np.isnan(case.operator()(**feeds)[0]).all()


def test_what_fills_a_text_up_needs_room_as_well() -> None:
    case = Case(before=(0, 0), tokens=9, rotary=32)
    feeds = case.feeds() | {"last": np.array([8, 3], np.int32)}
    shorter = replace(case, tokens=4)
    full = case.operator()(**feeds)[0]
    alone = {key: feeds[key][1:, :4] if key == "q" else feeds[key] for key in feeds}
    alone |= {key: feeds[key][1:] for key in ("past_k", "past_v", "last")}
    np.testing.assert_array_equal(shorter.operator()(**alone)[0][0], full[1, :4])
    for key in ("past_k", "past_v"):
        feeds[key] = feeds[key][:, :, :8]
    feeds["last"] = np.array([3, 3], np.int32)
    with pytest.raises(Exception, match="longer than keys and values have room for"):
        case.operator()(**feeds)


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("q", np.s_[..., :-16], "queries, keys or values have another size"),
        ("q", np.s_[0], "queries, keys or values have other axes"),
        ("past_k", np.s_[:, :1], "past keys and values have different sizes"),
        ("past_v", np.s_[:, :, :-1], "past keys and values have different sizes"),
        ("last", np.s_[:1], "seqlens_k has another size"),
        ("cos", np.s_[:, :-1], "cosines or sines have another size or type"),
        ("sin", np.s_[:-1], "cosines or sines have another size or type"),
    ],
)
def test_inputs_of_another_size_are_refused(name: str, cut: Any, message: str) -> None:
    case = Case(before=(5, 3), tokens=2, rotary=32)
    feeds = case.feeds()
    feeds[name] = feeds[name][cut]
    with pytest.raises(Exception, match=message):
        case.operator()(**feeds)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (-1, "seqlens_k has a negative length"),
        (7, "longer than keys and values have room for"),
        (2**31 - 1, "longer than keys and values have room for"),
    ],
)
def test_lengths_that_cannot_be_are_refused(last: int, message: str) -> None:
    case = Case(before=(5, 3), tokens=2)
    feeds = case.feeds() | {"last": np.array([3, last], np.int32)}
    with pytest.raises(Exception, match=message):
        case.operator()(**feeds)


def test_a_text_needs_angles_for_all_of_it() -> None:
    case = Case(before=(5, 3), tokens=2, rotary=32)
    feeds = case.feeds()
    feeds |= {key: feeds[key][:6] for key in ("cos", "sin")}
    with pytest.raises(Exception, match="a text is longer than there are angles"):
        case.operator()(**feeds)


@pytest.mark.parametrize("size", [8, 24, 528])
def test_heads_of_other_sizes_are_refused(size: int) -> None:
    case = Case(size=size)
    with pytest.raises(Exception, match="heads have 16 to 512 numbers, a multiple of 16"):
        case.operator()(**case.feeds())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (4, 0), (0, 4)])
def test_heads_that_keys_cannot_share_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(Exception, match="kv_num_heads does not divide num_heads"):
        Case(heads, kv_heads).operator()


def test_no_tokens_change_nothing() -> None:
    case = Case(before=(3,), tokens=1)
    feeds = case.feeds()
    out, keys, values = case.operator()(**feeds | {"q": feeds["q"][:, :0]})
    assert out.shape == (1, 0, 128)
    np.testing.assert_array_equal(keys, feeds["past_k"])
    np.testing.assert_array_equal(values, feeds["past_v"])


@given(
    window=st.integers(1, 90),
    slack=st.integers(0, 70),
    parts=st.lists(st.integers(1, 130), min_size=1, max_size=9),
    dtype=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_rolling_cache_gives_what_a_whole_one_gives(
    window: int, slack: int, parts: list[int], dtype: Any, seed: int
) -> None:
    heads, kept, size = 4, 2, 32
    random = np.random.default_rng(seed)
    packed = random.standard_normal((1, sum(parts), (heads + 2 * kept) * size)).astype(np.float32)
    found = []
    for rolling, rows in ((1, window + slack), (0, sum(parts))):
        operator = Operator(
            "GroupQueryAttention",
            ["q", "", "", "past_k", "past_v", "last", "total"],
            {"out": np.float32, "new_k": dtype, "new_v": dtype},
            given={
                "q": np.float32,
                "past_k": dtype,
                "past_v": dtype,
                "last": np.int32,
                "total": np.int32,
            },
            num_heads=heads,
            kv_num_heads=kept,
            scale=0.3,
            softcap=0.0,
            local_window_size=window,
            sliding_window_cache=rolling,
        )
        past = [np.full((1, kept, rows, size), np.nan, dtype) for _ in range(2)]
        outputs, place = [], 0
        for count in parts:
            end = place + count
            last, total = np.array([end - 1], np.int32), np.array(end, np.int32)
            out, *past = operator(
                q=packed[:, place:end], past_k=past[0], past_v=past[1], last=last, total=total
            )
            outputs.append(out)
            place = end
        found.append(np.concatenate(outputs, 1))
    np.testing.assert_array_equal(*found)
