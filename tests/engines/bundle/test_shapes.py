import pytest

from engines.bundle.shapes import bind, resolve


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("batch", 4, "height", "width"), (2, 4, 48, 64)),
        (("batch", 320, "height/8", "width/4"), (2, 320, 6, 16)),
        (("batch", 3, "8*height", "8*width"), (2, 3, 384, 512)),
        (("batch", "tokens=77", 768), (2, 154, 768)),
        ((), ()),
    ],
)
def test_resolve_and_bind_are_inverse(shape, expected):
    sizes = {"batch": 2, "height": 48, "width": 64, "tokens": 154}
    assert resolve(shape, sizes) == expected
    told: dict[str, int] = {}
    assert bind(shape, expected, told) is None
    assert told == {dim.strip("=/*0123456789"): sizes[dim.strip("=/*0123456789")] for dim in shape if isinstance(dim, str)}


def test_resolve_refuses_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match=r"height = 6 is not a multiple of 4, which dimension 'height/4' needs"):
        resolve(("height/4",), {"height": 6})


def test_a_size_that_nobody_says_is_the_usual_one():
    assert resolve(("batch", "tokens=77"), {"batch": 2}) == (2, 77)


def test_resolve_names_the_size_that_is_missing():
    with pytest.raises(KeyError, match=r"images"):
        resolve(("images", 3), {"batch": 2})


@pytest.mark.parametrize("dim", ["Batch", "2batch", "batch*2", "height//2", "height/", "", "-1", "tokens=", "height/2=3"])
def test_malformed_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match=r"is no dimension"):
        resolve((dim,), {"batch": 1, "height": 1})


@pytest.mark.parametrize(
    ("shape", "actual", "known", "message"),
    [
        (("batch", 4), (2, 4, 1), {}, "3 dimensions, expected 2"),
        (("batch", 4), (2, 5), {}, "dimension 1 is 5, expected 4"),
        (("batch",), (3,), {"batch": 2}, "dimension 0 is 3, expected batch with batch = 2"),
        (("height/2", "height"), (4, 9), {}, "dimension 1 is 9, expected height with height = 8"),
        (("height/2",), (4,), {"height": 9}, "dimension 0 is 4, expected height/2 with height = 9"),
        (("8*height",), (12,), {}, "dimension 0 is 12, expected 8*height with height = 1"),
    ],
)
def test_bind_says_what_does_not_fit(shape, actual, known, message):
    assert bind(shape, actual, dict(known)) == message


def test_bind_adds_to_what_is_known_and_keeps_the_rest():
    sizes = {"batch": 2}
    assert bind(("batch", "height/4"), (2, 4), sizes) is None
    assert sizes == {"batch": 2, "height": 16}
