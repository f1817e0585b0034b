"""What a person may type: every line is an answer or one clear line, and answers round-trip."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefenv.play.words import KINDS, BadReplyError, Reply, allowed, read, write

SIZES = st.integers(1, 12)


@pytest.mark.parametrize(
    ("line", "scores"),
    [
        ("0 3", (1, 0, 0, 1)),
        (" 3,0 \n", (1, 0, 0, 1)),
        ("2", (0, 0, 1, 0)),
        ("02", (0, 0, 1, 0)),
        ("", (0, 0, 0, 0)),
        ("   \r\n", (0, 0, 0, 0)),
        ("p 0.1 0.2 0 0.7", (0.1, 0.2, 0, 0.7)),
        ("P .5 1e-3", (0.5, 0.001, 0, 0)),
        ("p.5", (0.5, 0, 0, 0)),
        ("p 1.", (1, 0, 0, 0)),
    ],
)
def test_answers(line, scores):
    assert read(line, 4) == Reply("scores", tuple(map(float, scores)))


@pytest.mark.parametrize(
    ("line", "kind"),
    [("u", "undo"), ("S", "skip"), ("q\n", "quit"), ("?", "help"), ("h", "help"), ("Undo", "undo")],
)
def test_wishes(line, kind):
    assert read(line, 4) == Reply(kind)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("4", "there is no sample 4"),
        ("-1", "cannot read '-1'"),
        ("0 0", "0 is named twice"),
        ("1 01", "1 is named twice"),
        ("foo", "cannot read 'foo'"),
        ("0 x", "cannot read 'x'"),
        ("1.0", "cannot read '1.0'"),
        ("u 1", "'u' stands alone"),
        ("1 u", "cannot read 'u'"),
        ("p", "p wants numbers"),
        ("p 0 0 0 0", "p with only zeros"),
        ("p 0.1 0.1 0.1 0.1 0.1", "5 numbers for 4 samples"),
        ("p 0.2 much", "'much' is no number from 0 to 1"),
        ("p 1.1", "'1.1' is no number"),
        ("p -0.1", "'-0.1' is no number"),
        ("p nan", "'nan' is no number"),
        ("p inf", "'inf' is no number"),
        ("p 1e999", "'1e999' is no number"),
        ("²", "cannot read '\\xb2'"),
        ("٣", "cannot read '\\u0663'"),
        ("\x00\x1b[2J", "cannot read '\\x00\\x1b[2j'"),
        ("\udc80", "cannot read '\\udc80'"),
        ("9" * 5000, "cannot read '99999999999999999999...'"),
    ],
)
def test_what_is_no_answer_is_told_in_one_line(line, what):
    with pytest.raises(BadReplyError) as error:
        read(line, 4)
    text = str(error.value)
    assert text.startswith(what) and text.endswith(f"Allowed: {allowed(4)}")
    assert text.isprintable(), "one line, and nothing that moves the cursor"


TOKENS = st.sampled_from(["0", "3", "12", "p", "u", "0.5", "1e-300", ".", "e", "nan", "-", "q", ""])
LINES = st.one_of(st.text(), st.lists(TOKENS, max_size=6).map(" ".join))


@given(LINES, SIZES)
def test_no_line_crashes_and_every_answer_round_trips(line, size):
    try:
        reply = read(line, size)
    except BadReplyError as error:
        assert str(error).isprintable()
        return
    assert read(write(reply), size) == reply
    if reply.kind == "scores":
        assert len(reply.scores) == size
        assert all(0 <= s <= 1 and math.isfinite(s) for s in reply.scores)
    else:
        assert reply.kind in KINDS and reply.scores == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_every_judgement_can_be_typed(scores):
    reply = Reply("scores", tuple(abs(s) for s in scores))
    assert read(write(reply), len(scores)) == reply
