"""Records behave as frozen dataclasses do."""

import copy
import pickle

import pytest

from page_primer._lean import NamedTuple, Record, asdict, replace


class Point(Record, aside=("name",)):
    x: int
    y: int = 2
    name: str = ""


class Pair(NamedTuple):
    left: int
    right: int

    @property
    def sum(self) -> int:
        return self.left + self.right


class Line(Record):
    points: tuple[Point, ...]
    colours: dict[str, int]


def test_fields_and_defaults():
    point = Point(1)
    assert (point.x, point.y, point.name) == (1, 2, "")
    assert Point(1, name="a", y=5).y == 5
    assert repr(Point(1, 3, "hidden")) == "Point(x=1, y=3)"


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((), {"y": 1}), ((1, 2, "", 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1})],
)
def test_wrong_fields(values, named):
    with pytest.raises(TypeError, match="takes x, y, name"):
        Point(*values, **named)


def test_equality_and_hash():
    assert Point(1, 2, "a") == Point(1, name="b")
    assert len({Point(1, 2, "a"), Point(1, 2, "b"), Point(1, 3)}) == 2
    assert Point(1) != (1, 2, "")


def test_immutable():
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert point.x == 1


def test_copies():
    point = Point(1, 3, "a")
    changed = replace(point, x=2)
    assert (changed.x, changed.y, changed.name, point.x) == (2, 3, "a", 1)
    with pytest.raises(TypeError):
        replace(point, z=2)
    for same in (copy.copy(point), copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert (same, same.name) == (point, "a")


def test_plain_data():
    line = Line((Point(1), Point(2)), {"red": 1})
    plain = asdict(line)
    points = ({"x": 1, "y": 2, "name": ""}, {"x": 2, "y": 2, "name": ""})
    assert plain == {"points": points, "colours": {"red": 1}}
    plain["colours"]["red"] = 9
    assert line.colours == {"red": 1}


def test_tuples_with_names():
    """As typing.NamedTuple's, which takes longer to import."""
    pair = Pair(1, right=2)
    assert pair == (1, 2) == Pair._make([1, 2])
    assert (pair.left, pair.right, pair.sum, Pair._fields) == (1, 2, 3, ("left", "right"))
    assert repr(pair) == "Pair(left=1, right=2)"
    assert pickle.loads(pickle.dumps(pair)).right == 2
    changed = pair._replace(right=5)
    assert (type(changed), changed) == (Pair, (1, 5))
    with pytest.raises(ValueError, match="middle"):
        pair._replace(middle=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        pair.left = 3  # type: ignore[misc]
    for values, named in ((), {}), ((1,), {}), ((1, 2, 3), {}), ((1, 2), {"right": 3}):
        with pytest.raises(TypeError, match="takes left, right"):
            Pair(*values, **named)
