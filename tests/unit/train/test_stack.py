"""The stack: views into one vector, and initial weights that know nothing of the neighbours."""

import torch

from lorary.train.stack import ExpertStack

TARGETS = {"q_proj": (6, 5), "o_proj": (4, 6)}


def stack_of(*names: str, init: str = "shared", seed: int = 0) -> ExpertStack:
    stack = ExpertStack(names, TARGETS, 2, 4.0, torch.float64, torch.device("cpu"))
    stack.initialise(seed, init, 1.0)
    return stack


def test_factors_and_gradients_are_views_into_one_vector() -> None:
    stack = stack_of("a", "b")
    assert stack.parameters.numel() == 2 * (2 * 6 + 5 * 2 + 2 * 4 + 6 * 2)
    assert [tuple(block.shape) for block in stack.blocks(stack.parameters)] == [(2, 12), (2, 10), (2, 8), (2, 12)]
    stack.parameters.fill_(7.0)
    for module in stack.modules.values():
        assert (module.lora_a == 7).all()
        (module.lora_a.sum() + 2 * module.lora_b.sum()).backward()
    assert [block.unique().tolist() for block in stack.blocks(stack.gradient)] == [[1], [2], [1], [2]]


def test_factors_of_an_expert_are_copies_with_its_scaling() -> None:
    stack = stack_of("a", "b")
    factors = stack.factors(1, stack.parameters)
    assert list(factors) == ["q_proj", "o_proj"]
    assert (factors["o_proj"].d_in, factors["o_proj"].d_out, factors["o_proj"].scaling) == (4, 6, 4.0)
    before = factors["q_proj"].lora_a.clone()
    stack.parameters.zero_()
    assert torch.equal(factors["q_proj"].lora_a, before)


def test_initial_weights_depend_on_seed_layer_and_name_alone() -> None:
    own = stack_of("a", "b", init="own")
    alone, other_order = stack_of("b", init="own"), stack_of("b", "c", "a", init="own")
    for path, module in own.modules.items():
        assert torch.equal(module.lora_a[1], alone.modules[path].lora_a[0])
        assert torch.equal(module.lora_a[0], other_order.modules[path].lora_a[2])
        assert not torch.equal(module.lora_a[0], module.lora_a[1])
        assert (module.lora_b == 0).all()
    assert not torch.equal(stack_of("a", init="own", seed=1).parameters, stack_of("a", init="own").parameters)


def test_a_shared_draw_is_one_for_the_whole_library() -> None:
    stack = stack_of("a", "b")
    for path, module in stack.modules.items():
        assert torch.equal(module.lora_a[0], module.lora_a[1])
        assert torch.equal(module.lora_a[0], stack_of("z").modules[path].lora_a[0])


def test_initial_weights_fill_the_bound_of_peft_times_the_scale() -> None:
    stack = ExpertStack(["a"], {"q_proj": (100, 5)}, 8, 1.0, torch.float32, torch.device("cpu"))
    stack.initialise(0, "own", 0.5)
    lora_a = stack.modules["q_proj"].lora_a
    assert 0.049 < lora_a.max() < 0.05
    assert -0.05 < lora_a.min() < -0.049
    assert lora_a.mean().abs() < 0.005
