"""Strategies for damaged files."""

from hypothesis import strategies as st

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from(
        [0, -1, 1, 2, 10**9, 2**63, 1e400, float("nan"), "", "0", "none", "../../x", "/etc/passwd", [], {}]
    ),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 9), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes with some of them changed, and perhaps cut, doubled or prefixed."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 6))):
        head = draw(st.booleans())  # most of what a decoder can trip over is near the start
        changed[draw(st.integers(0, min(len(changed), 200 if head else len(changed)) - 1))] = draw(st.integers(0, 255))
    start, stop = draw(st.sampled_from([(0, None), (0, None), (0, -1), (1, None), (0, 40)]))
    changed = changed[start:stop]
    if draw(st.booleans()):
        changed = changed[: draw(st.integers(0, len(changed)))]
    return bytes(changed)


@st.composite
def altered(draw, value):
    """A JSON value with one to three of its parts replaced, dropped or added."""
    for _ in range(draw(st.integers(1, 3))):
        value = _alter(draw, value)
    return value


def _alter(draw, value):
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        what = draw(st.integers(0, 9))
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return value | {draw(st.text(max_size=8)): draw(ODD)}
        return value | {key: _alter(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], _alter(draw, value[i]), *value[i + 1 :]]
    return draw(ODD)
