"""Settings classes as options of a command: names, types, defaults and help come from the class alone."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin

import typer

from lorary.flags import Flag, defaults_of, flags_of, helps_of, option_of
from lorary.flags import OptionValues as OptionValues


@dataclass(frozen=True)
class CommandOptions:
    """Marks the one parameter of a command that stands for the options of its settings classes; it gets `OptionValues`.

    Args:
        settings: the classes. Options appear in the order of their fields.
        omit: by class, fields that the command does not ask for.
        methods: by field, the methods that look at it here, for the help.
        defaults: by field, what its default is called here, for the help.
    """

    settings: tuple[type, ...]
    omit: Mapping[type, tuple[str, ...]] = field(default_factory=dict)
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> dict[str, tuple[type, "Field[Any]", inspect.Parameter]]:
        """By name of the parameter: the class, its field, and the parameter as typer reads it.

        Fields that hold settings in their turn, and those without an option, are left out.
        """
        parameters = {}
        for settings in self.settings:
            rules, helps, defaults = flags_of(settings), helps_of(settings), defaults_of(settings)
            for setting in fields(settings):
                is_nested = is_dataclass(setting.type) or get_origin(setting.type) is Mapping
                if setting.name in self.omit.get(settings, ()) or rules[setting.name].option == "" or is_nested:
                    continue
                flag, option = rules[setting.name], option_of(settings, setting.name)
                name = f"{settings.__name__}_{setting.name}"
                methods = self.methods.get(setting.name, flag.methods)
                sentence = f"{', '.join(methods)}: {helps[setting.name]}" if methods else helps[setting.name]
                help_text = f"{sentence}{_default_text(self.defaults.get(setting.name, defaults[setting.name]))}"
                annotation = Annotated[  # type: ignore[valid-type]
                    _kind(setting.type, flag) | None, typer.Option(option, metavar=flag.metavar, help=help_text)
                ]
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters[name] = settings, setting, inspect.Parameter(name, kind, default=None, annotation=annotation)
        return parameters


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it: the parameter marked with `CommandOptions` becomes the options it stands for."""
    parameters: list[inspect.Parameter] = []
    options: dict[str, tuple[type, Field[Any], inspect.Parameter]] = {}
    for parameter in inspect.signature(command).parameters.values():
        marks = [mark for mark in getattr(parameter.annotation, "__metadata__", ()) if isinstance(mark, CommandOptions)]
        if marks:
            group, classes, options = parameter.name, marks[0].settings, marks[0].parameters()
            parameters.extend(parameter for _, _, parameter in options.values())
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**values: Any) -> None:
        option_values: dict[type, dict[str, Any]] = {settings: {} for settings in classes}
        for name, (settings, setting, _) in options.items():
            value = values.pop(name)
            if value is not None:
                option_values[settings][setting.name] = _parsed(setting, value)
        command(**values, **{group: option_values})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def split_names(names: str | None) -> list[str] | None:
    """`a,b` as a list; None stays None."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _default_text(default: Any) -> str:
    if default is None or default is False or default in ("", ()):
        return ""
    return f"  [default: {','.join(map(str, default)) if isinstance(default, tuple) else default}]"


def _kind(annotation: Any, flag: Flag) -> Any:
    """The type as which typer parses a field."""
    if _is_tuple(annotation):
        return list[str] if flag.is_repeated else str
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    return str if flag.parse else kinds[0]


def _parsed(setting: "Field[Any]", value: Any) -> Any:
    parse = setting.metadata["flag"].parse if "flag" in setting.metadata else None
    if parse is not None:
        return parse(value)
    if _is_tuple(setting.type):
        return tuple(value if isinstance(value, list) else split_names(value) or ())
    return value


def _is_tuple(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (annotation, *get_args(annotation)))
