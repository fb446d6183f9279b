"""The command `lorary`: parse, call one recipe, say where the result lies."""

import sys
import warnings
from typing import Any

import typer

from lorary.cli.app import app
from lorary.cli.options import visible
from lorary.errors import LoraryError
from lorary.terminal import PrintableStream

# What shells give a command that Ctrl-C ended.
INTERRUPTED = 130


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.

    Errors go to stderr in one to three lines (rule, value found, remedy); `--debug` shows the traceback too.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    warnings.showwarning = _print_warning
    # Names and texts of strangers are printed all over: a control character in one must not reach the terminal.
    sys.stdout, sys.stderr = PrintableStream(sys.stdout), PrintableStream(sys.stderr)
    try:
        # Not standalone: typer would end the process itself, on Ctrl-C without a word.
        code = app(arguments, prog_name="lorary", standalone_mode=False)
    except LoraryError as error:
        if debug:
            raise
        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own errors, whose class moves between versions of typer
            sys.exit(_print_wrong_usage(error))
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}\nremedy: see where it happened with --debug", file=sys.stderr)
        sys.exit(1)
    if code == INTERRUPTED:
        print("interrupted: run the same command to go on from here", file=sys.stderr)
    sys.exit(code or 0)


def _print_wrong_usage(error: Any) -> int:
    """Say what the parser found; a command without its subcommand gets the whole help, which is the message then."""
    message = str(error.format_message()).strip()
    command = error.ctx.command_path if getattr(error, "ctx", None) else "lorary"
    print(message if "\n" in message else f"error: {message}\nremedy: {command} --help", file=sys.stderr)
    return int(error.exit_code)


def _print_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
