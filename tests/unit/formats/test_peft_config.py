"""adapter_config.json: every field of PEFT's LoraConfig is handled, irrelevant, or refused by name."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorary.errors import AdapterError
from lorary.formats.peft_config import HANDLED, IRRELEVANT, REFUSED, check_config, new_config
from lorary.formats.peft_selection import Selection

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "transformer.h.2.attn.c_attn",
    "layers.3.q_proj",
    "lm_head",
]


def config(**changes: Any) -> dict[str, Any]:
    return {**new_config("base", rank=2, alpha=4, target_modules=["q_proj"]), **changes}


def test_every_field_of_the_installed_lora_config_is_classified_once() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    tables = [set(HANDLED), set(IRRELEVANT), set(REFUSED)]
    assert fields == set.union(*tables)
    assert sum(len(table) for table in tables) == len(fields)


def test_pefts_own_defaults_pass() -> None:
    check_config("a", {**peft.LoraConfig(r=4).to_dict(), "peft_type": "LORA"})


def test_what_lorary_writes_is_what_peft_reads() -> None:
    told = new_config(
        "base", rank=4, alpha=8, target_modules={"v", "q"}, dropout=0.1, use_rslora=True,
        rank_pattern={"q": 2}, alpha_pattern={"v": 3},
    )  # fmt: skip
    read = peft.LoraConfig.from_peft_type(**told).to_dict()
    assert told["target_modules"] == ["q", "v"]
    assert {key: read[key] for key in told} == {**told, "target_modules": {"q", "v"}, "peft_type": "LORA"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("alora_invocation_tokens", [7]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("megatron_config", {"tp": 2}),
        ("arrow_config", {"top_k": 3}),
        ("ensure_weight_tying", True),
        ("a_field_of_tomorrow", 1),
        ("a_field_of_tomorrow", True),
    ],
)
def test_a_field_that_changes_the_function_otherwise_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=rf"adapter 'a' must be a plain LoRA, but {field} is set"):
        check_config("a", config(**{field: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True, "use_dora": True}, "must have lora_bias or use_dora, not both"),
        ({"lora_bias": "yes"}, "must give lora_bias as true or false"),
        ({"use_dora": {"a": 1}}, "must give use_dora as true or false"),
    ],
)
def test_what_peft_does_not_load_of_biases_and_magnitudes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_config("a", config(**changes))
    with pytest.raises((ValueError, TypeError)) if len(changes) == 2 else nullcontext():
        peft.LoraConfig(r=4, **changes)


def test_each_refused_field_has_such_a_test() -> None:
    marks = test_a_field_that_changes_the_function_otherwise_is_refused_by_name.pytestmark  # type: ignore[attr-defined]
    assert set(REFUSED) <= {field for field, _ in marks[0].args[1]}


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_empty_passes(value: Any) -> None:
    check_config("a", config(a_field_of_tomorrow=value))


@pytest.mark.parametrize(
    "kind", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "of_tomorrow", {"kind": 1}]
)
def test_an_initialisation_that_changes_the_base_weights_is_refused(kind: Any) -> None:
    with pytest.raises(AdapterError, match="must leave the base weights alone"):
        check_config("a", config(init_lora_weights=kind))


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_passes(kind: Any) -> None:
    check_config("a", config(init_lora_weights=kind))


@pytest.mark.parametrize("kind", [None, "IA3", "LOHA", "lora"])
def test_another_kind_of_adapter_is_refused(kind: Any) -> None:
    with pytest.raises(AdapterError, match="peft_type must be LORA"):
        check_config("a", config(peft_type=kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": None}, "must give r as a finite number"),
        ({"lora_alpha": "16"}, "must give lora_alpha as a finite number"),
        ({"lora_alpha": True}, "must give lora_alpha as a finite number"),
        ({"rank_pattern": [1]}, "must give rank_pattern as a mapping"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\]"),
        ({"alpha_pattern": {"q(": 1}}, "valid regular expressions in alpha_pattern"),
        ({"target_modules": "q("}, "valid regular expressions in target_modules"),
        ({"target_modules": 3}, "must give target_modules as a list of names"),
        ({"layers_to_transform": ["1"]}, "must give layers_to_transform as layer numbers"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_config("a", config(**changes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2, "layers.0.self_attn.q_proj": 3},
        {"^model.layers.0.self_attn.q_proj": 2},
        {"proj": 2, "_proj": 3},
        {r".*\.(0|1)\..*": 5},
        {"lm_head": 7, "head": 8},
        {},
    ],
)
def test_patterns_choose_as_pefts_own_function_does(pattern: dict[str, int], path: str) -> None:
    expected = pattern.get(get_pattern_key(list(pattern), path), 4)
    assert Selection("a", config(r=1, lora_alpha=4, alpha_pattern=pattern)).scaling(path, 1) == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["q_proj", "up_proj", "lm_head"]},
        {"target_modules": "model.*q_proj"},
        {"target_modules": ["proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.11.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 3]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [2, 3, 11], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "experts"},
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [5]},
    ],
)
def test_layers_are_selected_as_pefts_own_function_does(selection: dict[str, Any], path: str) -> None:
    theirs = bool(check_target_module_exists(peft.LoraConfig(**selection), path))
    assert Selection("a", config(**selection)).has(path) == theirs


def test_target_modules_that_peft_chooses_by_itself_take_every_layer() -> None:
    assert Selection("a", config(target_modules="all-linear")).has(PATHS[0])
    assert Selection("a", config(target_modules=None)).has(PATHS[0])
