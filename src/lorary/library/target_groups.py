"""Which adapters of a library adapt which layers, where these differ: scores and clusters follow that."""

from collections.abc import Iterable, Mapping

from lorary.lora.targets import place_of

# So many groups are described, and so many adapters of each are named.
_SHOWN = 3


def different_targets(layers: Mapping[str, Iterable[str]]) -> str:
    """The groups of adapters by the modules that they adapt and the transformer layers in which they do, in words.

    >>> different_targets({"a": ["layers.0.q_proj"], "b": ["layers.0.q_proj", "layers.0.up_proj"]})
    'q_proj (a); q_proj, up_proj (b)'

    Args:
        layers: paths of the layers that each adapter has factors for, by its name.

    Returns:
        Empty where all adapt the same.
    """
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for name, paths in layers.items():
        places = [place_of(path) for path in paths]
        modules = tuple(sorted({module.rpartition(".")[2] for module, _ in places}))
        numbers = tuple(
            sorted({depth for _, depth in places}, key=lambda depth: (depth.isdecimal(), len(depth), depth))
        )
        groups.setdefault((modules, numbers), []).append(name)
    if len(groups) < 2:
        return ""
    is_everywhere = len({numbers for _, numbers in groups}) == 1
    shown = [
        f"{', '.join(modules)}{'' if is_everywhere else _span(numbers)} ({_named(names)})"
        for (modules, numbers), names in sorted(groups.items(), key=lambda group: (-len(group[1]), group[1][0]))
    ]
    return "; ".join(shown[:_SHOWN]) + (f"; {len(shown) - _SHOWN} more groups" if len(shown) > _SHOWN else "")


def _span(numbers: tuple[str, ...]) -> str:
    """The transformer layers: `-` stands before the numbers, for layers outside of all."""
    inside = [number for number in numbers if number.isdecimal()]
    return f" in {len(inside)} transformer layers, {inside[0]} to {inside[-1]}" if inside else ""


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
