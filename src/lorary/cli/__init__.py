"""The command `lorary`: parse, call one recipe, say where the result lies."""

import sys
import warnings
from typing import Any

from lorary.cli.app import app
from lorary.errors import LoraryError


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.

    Errors go to stderr in one to three lines (rule, value found, remedy); `--debug` shows the traceback too.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    warnings.showwarning = _print_warning
    try:
        app(arguments, prog_name="lorary")
    except LoraryError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: run the same command to go on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)  # the reader of our output went away
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}\nremedy: see where it happened with --debug", file=sys.stderr)
        sys.exit(1)


def _print_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
