"""The command line: finds the verb, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module

from planner.commands import COMMANDS, Command
from planner.errors import MissingExtraError, VramwiseError, nearest_name

EXIT_OK, EXIT_DOES_NOT_FIT, EXIT_BAD_INPUT, EXIT_BUG = 0, 1, 2, 70


def main(argv: list[str] | None = None) -> int:
    """Entry point of `vramwise`. Returns the exit code: 0 fits, 1 does not, 2 bad input, 70 bug."""
    collects = gc.isenabled()
    gc.disable()  # imports make much and drop little: collecting meanwhile costs a tenth of fit
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    finally:
        if collects:
            gc.enable()
        if argv is None:
            gc.freeze()  # the process ends: the interpreter need not look for garbage once more


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"vramwise {version('vramwise')}")
        return EXIT_OK
    try:
        return _run(arguments[0], arguments[1:])
    except VramwiseError as error:
        print(_prefixed(str(error)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_BAD_INPUT
    except Exception as error:
        if os.environ.get("VRAMWISE_TRACEBACK"):
            raise
        print(
            f"internal error: {type(error).__name__}: {error} "
            "(a bug of ours; VRAMWISE_TRACEBACK=1 shows where)",
            file=sys.stderr,
        )
        return EXIT_BUG


def _run(verb: str, arguments: list[str]) -> int:
    commands = {command.verb: command for command in COMMANDS}
    command = commands.get(verb)
    if command is None:
        near = nearest_name(verb, commands)
        hint = f"; did you mean {near!r}?" if near else ""
        raise VramwiseError(f"no verb {verb!r}: one of {', '.join(commands)}{hint}")
    function = _load(command)
    if not command.brief:
        gc.enable()
    return function(arguments)


def _load(command: Command):  # type: ignore[no-untyped-def]
    module, _, function = command.target.partition(":")
    try:
        return getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if command.extra and missing not in ("planner", "probes", "recipes"):
            raise MissingExtraError(command.verb, command.extra, missing) from None
        raise


def _usage() -> str:
    width = max(len(command.verb) for command in COMMANDS)
    lines = ["vramwise: will this fine-tune fit on my GPU, how fast, and what do I change?", ""]
    lines += [f"  vramwise {c.verb:<{width}}  {c.summary}" for c in COMMANDS]
    return "\n".join([*lines, "", "vramwise VERB --help says what a verb takes"])


def _prefixed(text: str) -> str:
    return "\n".join(f"error: {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
