"""YAML without its traps: a key that comes twice, and values that no report could be written with, are refused."""

import json
from typing import Any

import yaml

from lorary.errors import UsageError


def strict_yaml(text: str, what: str) -> Any:
    """The content of a YAML file, of plain types; keys are texts.

    Args:
        text: of the file.
        what: it is, for the error.

    Raises:
        UsageError: if it is no YAML, a key comes twice in a mapping, or a value could not be written again.
    """
    try:
        read = yaml.load(text, _Loader)
        # Found now and not with the report: text that is no text, a list that holds itself.
        json.dumps(read, ensure_ascii=False, default=str).encode()
    # Values that are not what their tag or form promises (`!!bool maybe`, a 13th month) are no YAMLError.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{what} must be YAML", found=found[:300]) from error
    return read


class _Loader(yaml.SafeLoader):
    """Keys are texts, none of them twice: the later one would silently take the place of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """A mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(None, None, f"key '{twice[0]}' comes twice", node.start_mark)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}
