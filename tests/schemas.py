"""Random JSON schemas whose instances a random model finds in few tokens."""

from __future__ import annotations

from hypothesis import strategies as st

KEYS = ["a", "b", "long name", "é", 'quo"te', "x/y~z"]
SCALARS = [
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
              st.integers(-50, 50), st.integers(0, 200)),
    st.builds(lambda low: {"type": "number", "minimum": low, "maximum": low + 2}, st.integers(-3, 3)),
    st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
              st.integers(0, 2), st.integers(0, 3)),
    st.just({"type": "string", "pattern": "^[a-c]{2}$"}),
    st.just({"type": "string", "format": "date"}),
    st.lists(st.sampled_from([1, 2.5, "one", None, True, "é", [1], {"a": 1}]), min_size=1, max_size=3)
    .map(lambda values: {"enum": values}),
    st.sampled_from([{"const": "x"}, {"const": 7}, {"type": ["integer", "null"], "minimum": 0, "maximum": 9}]),
]  # fmt: skip


def _objects(inner):
    def build(properties, num_required):
        names = list(properties)
        return {
            "type": "object", "properties": properties, "required": names[:num_required],
            "additionalProperties": False,
        }  # fmt: skip

    properties = st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    return st.builds(build, properties, st.integers(0, 3))


def _arrays(inner):
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner, st.integers(0, 1), st.integers(0, 2),
    )  # fmt: skip


def _referring(schema):
    """The same by a reference, whose target a pydantic model would have too."""
    return {
        "$defs": {"Inner": schema}, "type": "object", "properties": {"inner": {"$ref": "#/$defs/Inner"}},
        "required": ["inner"], "additionalProperties": False,
    }  # fmt: skip


schemas = st.recursive(
    st.one_of(SCALARS),
    lambda inner: _objects(inner) | _arrays(inner) | st.lists(inner, min_size=1, max_size=2).map(
        lambda some: {"anyOf": some}
    ),
    max_leaves=4,
)  # fmt: skip
answers = _objects(schemas) | _arrays(schemas) | schemas | _objects(schemas).map(_referring)
