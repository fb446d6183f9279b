"""Routers as people write them."""

import pytest

from lorary.errors import LoraryError
from lorary.route import ROUTERS
from lorary.route.setting import FIELDS
from lorary.route.spec import RouterSpec, parse_spec, split_specs


def test_commas_inside_brackets_do_not_split_the_list() -> None:
    text = 'base, arrow[top_k=2,temperature={"0":0.5,"1":2}],experts[a+b] ,contrast[allow=["a,]b"]],,oracle'
    assert split_specs(text) == [
        "base", 'arrow[top_k=2,temperature={"0":0.5,"1":2}]', "experts[a+b]", 'contrast[allow=["a,]b"]]', "oracle",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*ROUTERS, "oracle"])
def test_a_name_alone_is_its_own_label(name: str) -> None:
    assert parse_spec(name) == RouterSpec(name, {})
    assert parse_spec(f" {name} ").label == name


@pytest.mark.parametrize(
    ("text", "label", "fields"),
    [
        ("arrow[temperature=0.50, top-k=2]", "arrow[top_k=2,temperature=0.5]", {"top_k": 2, "temperature": 0.5}),
        ("arrow[temperature=1e-1]", "arrow[temperature=0.1]", {"temperature": 0.1}),
        ("arrow[top_k=2,preset=paper-2024]", "arrow[preset=paper-2024,top_k=2]", {"preset": "paper-2024", "top_k": 2}),
        ("uniform[allow=a+b]", "uniform[allow=a+b]", {"allow": ["a", "b"]}),
        ("norm[calibrated=true,top_p=null]", "norm[top_p=null,calibrated=true]", {"calibrated": True, "top_p": None}),
        ('arrow[temperature={"1": 2, "0": 1}]', 'arrow[temperature={"0":1,"1":2}]', {"temperature": {"0": 1, "1": 2}}),
    ],
)
def test_one_way_of_writing_a_router_labels_it_and_reads_the_same(text: str, label: str, fields: object) -> None:
    spec = parse_spec(text)
    assert (spec.label, spec.fields) == (label, fields)
    assert parse_spec(label) == spec


def test_a_number_has_one_label_however_it_is_written() -> None:
    labels = {parse_spec(f"arrow[temperature={text}]").label for text in ("1", "1.0", "1e0", "10e-1")}
    assert labels == {"arrow[temperature=1]"}


def test_experts_are_named_with_a_plus_between() -> None:
    assert parse_spec("experts[ b + a ]").experts == ("b", "a")
    assert parse_spec("experts[b+a]").label == "experts[b+a]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arow", "a router must exist"),
        ("", "a router must exist"),
        ("arrow[top_k=2", "must hold something and be closed"),
        ("arrow[]", "must hold something and be closed"),
        ("arrow[top_k=2]x", "must hold something and be closed"),
        ("arrow[top_k]", "must hold FIELD=VALUE"),
        ("arrow[top_k=1,top_k=2]", "each field once"),
        ("arrow[router=norm]", "neither router nor experts"),
        ("arrow[topk=2]", "must name a field"),
        ("arrow[temperature=.5]", "temperature must be a number"),
        ("arrow[top_k=true]", "top_k must be a number"),
        ("arrow[top_k=null]", "top_k must have a value"),
        ("oracle[top_k=2]", "'oracle' has no settings"),
        ("base[top_k=2]", "'base' has no settings"),
        ("experts", "experts.* must hold different names"),
        ("experts[a,b]", "experts.* must hold different names"),
        ("experts[a+a]", "experts.* must hold different names"),
    ],
)
def test_what_cannot_be_a_router_is_refused(text: str, message: str) -> None:
    with pytest.raises(LoraryError, match=message):
        parse_spec(text)


def test_every_field_of_a_setting_may_stand_in_brackets() -> None:
    own = {"router", "experts"}
    for field in {*FIELDS} - own:
        assert parse_spec(f"arrow[{field}=3]").fields == {field: ["3"] if field in ("allow", "general") else 3}
