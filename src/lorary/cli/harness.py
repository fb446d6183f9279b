"""`lorary evaluate --harness`: tasks of lm-evaluation-harness, and the options that mean nothing to them."""

import json

from lorary.cli.flags import OptionValues, split_names
from lorary.cli.options import Output, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.evaluate.settings import EvaluateSettings, HarnessSettings
from lorary.flags import defaults_of, option_of
from lorary.recipes.base_options import BaseOptions

_TAKEN = ("routers", "rows", "template")


def evaluate_harness(library: str, tasks: str, options: OptionValues) -> None:
    """Run tasks of the harness and print what came of it.

    Args:
        library: folder of the library.
        tasks: names, separated by commas.
        options: the options of the command.

    Raises:
        UsageError: if an option means nothing here, or `--harness` was not given but its further options were.
    """
    if not options[HarnessSettings].get("harness"):
        raise UsageError("--harness-path and --shots go with --harness", found="no --harness")
    shared = (BaseOptions, HarnessSettings, Output, RouterFields)
    foreign = [
        option_of(settings, name)
        for settings, fields in options.items()
        for name in fields
        if settings not in shared and not (settings is EvaluateSettings and name in _TAKEN)
    ]
    if foreign:
        raise UsageError(
            "tasks of the harness bring their own rows and metrics", found=foreign, remedy="leave them out"
        )
    from lorary.recipes.harness import run_harness
    from lorary.report.tables import print_harness
    from lorary.route.spec import split_specs

    defaults, settings = defaults_of(EvaluateSettings), options[EvaluateSettings]
    result = run_harness(
        library,
        split_names(tasks) or [],
        routers=split_specs(settings.get("routers", ",".join(defaults["routers"]))),
        settings=HarnessSettings(rows=settings.get("rows", defaults["rows"]), **options[HarnessSettings]),
        template=settings.get("template"),
        load=BaseOptions(**options[BaseOptions]),
        route=route_fields(**options[RouterFields]),
    )
    if Output(**options[Output]).as_json:
        print(json.dumps(result.to_json()))
    else:
        print_harness(result)
