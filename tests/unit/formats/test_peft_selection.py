"""Patterns of strangers: matched as PEFT matches them, and never for longer than seconds."""

import time
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorary.errors import AdapterError
from lorary.formats.peft_config import check_config, new_config
from lorary.formats.peft_selection import MOST_SECONDS, Selection

PATH = "model.layers.10.self_attn.q_proj"
BOMB = "(((((.{1,9}){1,9}){1,9}){1,9}){1,9})(?=!)"


def config(**changes: Any) -> dict[str, Any]:
    return {**new_config("base", rank=2, alpha=4, target_modules=["q_proj"]), **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": BOMB},
        {"exclude_modules": BOMB},
        {"rank_pattern": {BOMB: 4}},
        {"alpha_pattern": {BOMB: 4}},
        {"layers_to_transform": [1], "layers_pattern": BOMB},
        {"layers_to_transform": [1], "layers_pattern": ["h", BOMB]},
    ],
)
def test_a_pattern_that_would_take_for_ever_is_refused_within_seconds(changes: dict[str, Any]) -> None:
    told = config(**changes)
    check_config("a", told)
    selection, start = Selection("a", told), time.thread_time()
    with pytest.raises(AdapterError, match=rf"adapter 'a' must give patterns in {list(changes)[-1]} that can be"):
        (selection.has(PATH), selection.scaling(PATH, 2))
    assert time.thread_time() - start < 2 * MOST_SECONDS


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*.*)*x", "(a|a)*b", ".*" * 20 + "x", r"(\w+\.?)+!", "(?:a?){60}a{60}"]
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_patterns_that_are_slow_in_python_cost_nothing_here(pattern: str, field: str) -> None:
    value: Any = {pattern: 2} if field == "rank_pattern" else pattern
    told = config(**{"layers_to_transform": [1], field: value})
    check_config("a", told)
    selection, start = Selection("a", told), time.thread_time()
    for layer in range(40):
        selection.has(f"model.layers.{layer}.self_attn.{'a' * 30}")
        selection.scaling(f"model.layers.{layer}.self_attn.{'a' * 30}", 2)
    assert time.thread_time() - start < MOST_SECONDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "(" * 5000 + ")" * 5000}, "valid regular expressions in target_modules"),
        ({"target_modules": "a{99999999999999999999}"}, "valid regular expressions in target_modules"),
        ({"exclude_modules": "a" * 200_001 + "*"}, "valid regular expressions in exclude_modules"),
        ({"rank_pattern": {"(?:q_prj){e<=1}": 2}}, "valid regular expressions in rank_pattern"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "valid regular expressions in rank_pattern"),
        ({"target_modules": "[[:alpha:]]+"}, "valid regular expressions in target_modules"),
        ({"target_modules": r"\p{L}+"}, "valid regular expressions in target_modules"),
        ({"layers_pattern": ["h", "("]}, "valid regular expressions in layers_pattern"),
        ({"target_modules": ["q"] * 100_001}, "target_modules with 100,000 entries at most"),
        ({"exclude_modules": ["q"] * 100_001}, "exclude_modules with 100,000 entries at most"),
        ({"layers_to_transform": list(range(100_001))}, "layers_to_transform with 100,000 entries at most"),
        ({"rank_pattern": {str(key): 2 for key in range(100_001)}}, "rank_pattern with 100,000 entries at most"),
        ({"alpha_pattern": {f"x{key}.*": 2 for key in range(501)}}, "in alpha_pattern, with its other patterns 500 of"),
        (
            {"target_modules": "x" * 10_000 + "*", "rank_pattern": {"x" * 10_000 + "*": 2}},
            "found: 2 of 20,002 characters",
        ),
        ({"modules_to_save": [BOMB]}, "but modules_to_save is set"),
    ],
)
def test_what_python_and_here_would_read_differently_or_too_long_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    start = time.thread_time()
    with pytest.raises(AdapterError, match=message) as caught:
        check_config("a", config(**changes))
    assert time.thread_time() - start < MOST_SECONDS
    assert len(str(caught.value)) < 1000


def test_long_lists_are_matched_in_moments() -> None:
    names = [f"x{number}" for number in range(20_000)]
    told = config(target_modules=[*names, "q_proj"], rank_pattern=dict.fromkeys(names, 3))
    check_config("a", told)
    selection, start = Selection("a", told), time.thread_time()
    for layer in range(20):
        assert selection.has(f"model.layers.{layer}.self_attn.q_proj")
        assert selection.scaling(f"model.layers.{layer}.self_attn.q_proj", 2) == 2.0
    assert time.thread_time() - start < MOST_SECONDS


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 1e300, -1e300, float("nan"), float("inf"), "16", True, None, [4]]
)
def test_a_number_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    for told in (
        config(**{field: value}),
        config(**{"rank_pattern" if field == "r" else "alpha_pattern": {"q": value}}),
    ):
        with pytest.raises(AdapterError, match=r"must give \S+ as a finite number"):
            check_config("a", told)


@pytest.mark.parametrize("number", ["1" * 5000, "\u0661", "\u00b2", "00", "0x1"])
def test_layer_numbers_that_no_model_writes_are_no_layer_of_a_choice(number: str) -> None:
    told = config(layers_to_transform=[0, 5])
    assert not Selection("a", told).has(f"model.layers.{number}.q_proj") or number == "00"


PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "11", "q_proj", "self_attn", "experts", "proj"])
PATHS = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
PIECES = st.sampled_from(
    ["q_proj", ".", r"\.", ".*", "[01]", r"\d+", "(h|layers)", "^", "$", "model", "x?", "1{1,2}", "_", "(?:self_attn)"]
)
PATTERNS = st.lists(PIECES, min_size=1, max_size=5).map("".join)


@given(path=PATHS, pattern=PATTERNS)
def test_an_expression_for_targets_selects_as_in_peft(path: str, pattern: str) -> None:
    theirs = bool(check_target_module_exists(peft.LoraConfig(target_modules=pattern), path))
    assert Selection("a", config(target_modules=pattern)).has(path) == theirs


@given(path=PATHS, keys=st.lists(PATTERNS, min_size=1, max_size=3, unique=True))
def test_keys_of_patterns_choose_as_in_peft(path: str, keys: list[str]) -> None:
    alphas = {key: 10 + number for number, key in enumerate(keys)}
    expected = alphas.get(get_pattern_key(keys, path), 4)
    assert Selection("a", config(alpha_pattern=alphas)).scaling(path, 2) == expected / 2


@given(path=PATHS, pattern=st.lists(PATTERNS, max_size=2), layers=st.lists(st.integers(0, 11), max_size=2))
def test_layers_to_transform_choose_as_in_peft(path: str, pattern: list[str], layers: list[int]) -> None:
    told = {"target_modules": ["q_proj", "proj"], "layers_to_transform": layers, "layers_pattern": pattern}
    theirs = bool(check_target_module_exists(peft.LoraConfig(**told), path))
    assert Selection("a", config(**told)).has(path) == theirs


NAMES = st.lists(
    st.sampled_from(["q_proj", "proj", "model.h", r"h\.1", "layers.0.q_proj", r"1.q_proj", "a"]), min_size=1, max_size=3
)
LISTS = st.tuples(NAMES, st.sampled_from(["{}", "({})", "(?:{})"])).map(
    lambda drawn: drawn[1].format("|".join(drawn[0]))
)
STRANGE = st.lists(
    st.sampled_from(["model", "h", "1", "hX1", "layersX0", "q_proj", "1_q_proj", "a", ""]), min_size=1, max_size=4
)


@given(path=STRANGE.map(".".join), keys=st.lists(LISTS, min_size=1, max_size=3, unique=True))
def test_names_and_lists_of_names_that_are_looked_up_choose_as_in_peft(path: str, keys: list[str]) -> None:
    alphas = {key: 10 + number for number, key in enumerate(keys)}
    told = config(alpha_pattern=alphas, target_modules=keys[0])
    assert Selection("a", told).scaling(path, 2) == alphas.get(get_pattern_key(keys, path), 4) / 2
    assert Selection("a", told).has(path) == bool(
        check_target_module_exists(peft.LoraConfig(target_modules=keys[0]), path)
    )


def test_all_layers_of_a_large_model_as_one_expression_or_as_keys_are_looked_up_in_moments() -> None:
    paths = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(60) for expert in range(500)]
    told = config(
        target_modules="|".join(path.replace(".", r"\.") for path in paths), rank_pattern=dict.fromkeys(paths, 3)
    )
    start = time.thread_time()
    check_config("a", told)
    selection = Selection("a", told)
    assert all(selection.has(path) and selection.scaling(path, 3) for path in paths[::100])
    assert not selection.has("model.layers.60.mlp.experts.0.up_proj")
    assert time.thread_time() - start < 10  # it took minutes
