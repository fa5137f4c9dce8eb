"""Output of commands on stderr: one-line errors, and progress."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from tqdm import tqdm


T = TypeVar("T")

SECONDS = 30.0  # time between two progress lines if stderr is not a terminal
# Phrases in torch's error messages on a GPU, and on a CPU, for which torch has no specific exception.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate")
DEBUG = "--debug"
DEBUG_HELP = "Show the traceback of an error."


def print_error(message: object) -> None:
    """Print an error message as one red line on stderr."""
    line = " ".join(str(message).split("\n"))
    Console(stderr=True).print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def errors_in_one_line(debug: bool = False, out_of_memory: str = "") -> Iterator[None]:
    """Print errors caused by the user or the machine in one line, without a traceback, and exit with status 1.

    Others, such as a `TypeError`, are bugs in this project and keep their traceback.

    Args:
        debug: Re-raise the error with its traceback.
        out_of_memory: Advice for the user if torch runs out of memory.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError) as error:
        if debug:
            raise
        # An ImportError that is not a ModuleNotFoundError already says what to install.
        if isinstance(error, (ValueError, OSError, FloatingPointError)) or type(error) is ImportError:
            print_error(error)
        else:
            # The further lines of torch's messages are for torch's developers.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            lacks_memory = isinstance(error, MemoryError) or any(words in first for words in OUT_OF_MEMORY)
            print_error(
                f"{first} ({out_of_memory if lacks_memory and out_of_memory else f'{DEBUG} shows the traceback'})"
            )
        raise SystemExit(1) from None


def run_command(command: Callable[..., None], out_of_memory: str = "") -> None:
    """Like `typer.run`, but with one-line errors, or with tracebacks if --debug is among the arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=f"{DEBUG}: {DEBUG_HELP}")(command)
    run_app(app, out_of_memory)


def run_app(app: typer.Typer, out_of_memory: str = "") -> None:
    """Like `run_command`, for an app. --debug may stand anywhere, before or after a subcommand's name."""
    arguments = sys.argv[1:]
    with errors_in_one_line(DEBUG in arguments, out_of_memory):
        app([argument for argument in arguments if argument != DEBUG])


def tracked(items: Sequence[T], description: str | None) -> Iterable[T]:
    """Iterate over `items` with a progress bar on stderr; if that is no terminal, print a line every `SECONDS`.

    Args:
        items: Items to iterate over.
        description: Text beside the progress bar; None shows no bar.
    """
    bar = {} if sys.stderr.isatty() else {"delay": SECONDS, "mininterval": SECONDS, "miniters": 1, "leave": False}
    return tqdm(items, description, disable=description is None, file=sys.stderr, **bar)
