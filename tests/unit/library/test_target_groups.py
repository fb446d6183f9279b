"""Which adapters adapt which layers, in words."""

from lorary.library.target_groups import different_targets


def paths(*modules: str, layers: range = range(3)) -> list[str]:
    return [f"model.layers.{number}.block.{module}" for number in layers for module in modules]


def test_nothing_is_said_where_all_adapt_the_same() -> None:
    assert different_targets({}) == ""
    assert different_targets({"a": paths("q"), "b": paths("q")}) == ""


def test_groups_come_by_size_with_some_of_their_names() -> None:
    layers = {name: paths("q", "v") for name in "abcde"} | {"x": paths("q")}
    assert different_targets(layers) == "q, v (a, b, c and 2 more); q (x)"


def test_other_transformer_layers_count_as_other_targets() -> None:
    layers = {"a": paths("q", layers=range(12)), "b": [*paths("q", layers=range(6, 12)), "lm_head"]}
    assert different_targets(layers) == (
        "q in 12 transformer layers, 0 to 11 (a); lm_head, q in 6 transformer layers, 6 to 11 (b)"
    )


def test_of_many_groups_the_largest_are_described() -> None:
    layers = {f"e{number}": paths(f"m{number}") for number in range(6)}
    assert different_targets(layers) == "m0 (e0); m1 (e1); m2 (e2); 3 more groups"
