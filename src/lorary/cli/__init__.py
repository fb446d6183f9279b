"""The command `lorary`: parse, call one recipe, say where the result lies."""

# Nothing else up here: an interruption while this file is imported prints a traceback.
import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted, 143 terminated.

    Errors go to stderr in one to three lines (rule, value found, remedy); `--debug` shows the traceback too. A reader
    of stdout who closes it early, as `head` does, ends the command without a word, with 1.
    """
    try:
        # All that takes time is imported below here, since a signal that hits an import elsewhere prints a traceback.
        from lorary.cli.ending import Ending

        ending = Ending()
        ending.watch()
    except KeyboardInterrupt:
        _say("interrupted: run the same command to go on from here")
        sys.exit(INTERRUPTED)
    try:
        code = _run([argument for argument in sys.argv[1:] if argument != "--debug"])
        code = _flushed() or code
    except BaseException as error:
        # Libraries make errors of their own of a signal, in the midst of an import for example.
        if ending.signal_number is not None or isinstance(error, KeyboardInterrupt):
            code = INTERRUPTED
        elif not isinstance(error, Exception) or ("--debug" in sys.argv and not hasattr(error, "format_message")):
            raise
        else:
            code = _said(error)
    ending.is_over = True
    code = ending.code or code
    if ending.signal_number is not None or code == INTERRUPTED:
        ending.say()
        # Python kills itself by SIGINT at its end where an interruption left code that was run from a text, as that of
        # dataclasses is; the next such code makes it forget.
        exec("")
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    import warnings

    warnings.showwarning = _print_warning
    _take_any_text()
    from lorary.terminal import PrintableStream

    # Names and texts of strangers are printed all over: a control character in one must not reach the terminal.
    # One that our caller closed is None, and prints nothing.
    sys.stdout = sys.stdout and PrintableStream(sys.stdout)
    sys.stderr = sys.stderr and PrintableStream(sys.stderr)
    from lorary.cli.app import app

    # Not standalone: typer would end the process itself, on Ctrl-C without a word.
    return int(app(arguments, prog_name="lorary", standalone_mode=False) or 0)


def _said(error: Exception) -> int:
    """Say what went wrong, and give the exit code for it."""
    from lorary.errors import LoraryError

    if isinstance(error, LoraryError):
        _say(f"error: {error}")
        return error.exit_code
    if hasattr(error, "format_message"):  # the parser's own errors, whose class moves between versions of typer
        return _print_wrong_usage(error)
    if type(error).__name__ == "Abort":  # the parser's too
        return INTERRUPTED
    _say(_described(error))
    return 1


def _described(error: Exception) -> str:
    """An error that is none of ours in our form: what the system refused by its own words, a slip by its class."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        remedy = "see where it happened with --debug"
        return f"error: the system must allow what the command does\nfound: {error.strerror}{where}\nremedy: {remedy}"
    return f"error: {type(error).__name__}: {error}\nremedy: see where it happened with --debug"


def _take_any_text() -> None:
    """Let stdout and stderr take characters that their encoding lacks: they are written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flushed() -> int:
    """Write what stdout holds back while its failure can still be said; the exit code that this asks for."""
    if sys.stdout is None:  # closed by our caller
        return 0
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try once more at its end, and print a traceback.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        if not isinstance(error, BrokenPipeError):
            _say(f"error: stdout must take what the command prints\nfound: {error.strerror}")
        return 1
    return 0


def _say(text: str) -> None:
    """A line for people, where there is anyone to read it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def _print_wrong_usage(error: object) -> int:
    """Say what the parser found; a command without its subcommand gets the whole help, which is the message then."""
    message = str(error.format_message()).strip()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "lorary"
    _say(message if "\n" in message else f"error: {message}\nremedy: {command} --help")
    return int(error.exit_code)  # type: ignore[attr-defined]


def _print_warning(message: Warning | str, *_args: object, **_kwargs: object) -> None:
    _say(f"warning: {message}")
