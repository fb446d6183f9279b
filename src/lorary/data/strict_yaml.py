"""YAML without its traps: repeated keys, aliases that unfold without end, values that no report can hold."""

import json
from collections import Counter
from typing import Any

import yaml

from lorary.errors import UsageError

# Larger than any study or any head of a README; YAML is parsed at about a megabyte a second.
MAX_BYTES = 1024 * 1024
# Values that a file may hold once its aliases are written out.
MAX_VALUES = 100_000


def strict_yaml(text: str, label: str) -> Any:
    """The content of a YAML file, of plain types; keys are texts.

    Args:
        text: of the file.
        label: what the error calls the file.

    Raises:
        UsageError: if it is too large, no YAML, a key comes twice in a mapping, or a value could not be written again.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{label} must have at most {MAX_BYTES:,} characters", found=f"{len(text):,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        read = loader.construct_document(node)
        # Found now and not with the report: text that is no text.
        json.dumps(read, ensure_ascii=False, default=str).encode()
    # Values that are not what their tag or form promises (`!!bool maybe`, a 13th month) are no YAMLError.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        finding = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{label} must be YAML", found=finding[:300]) from error
    return read


def _check_size(root: yaml.Node) -> None:
    """Refuse what its aliases unfold to more than `MAX_VALUES` values, or to itself.

    Raises:
        yaml.YAMLError: if it does.
    """
    sizes: dict[int, int] = {}
    entered: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in entered:
            raise yaml.MarkedYAMLError(None, None, "a value that holds itself", node.start_mark)
        entered.add(id(node))
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        total = 1 + sum(map(size, inner))
        if total > MAX_VALUES:
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_VALUES:,} values", node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


class _Loader(yaml.SafeLoader):
    """Keys are texts, none of them twice: the later one would silently take the place of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """A mapping."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, number in keys.items() if number > 1]:
            raise yaml.MarkedYAMLError(None, None, f"key '{twice[0]}' comes twice", node.start_mark)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}
