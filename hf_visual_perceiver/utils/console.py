"""Output of commands on stderr: errors in one line, and progress."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from tqdm import tqdm


T = TypeVar("T")

SECONDS = 30.0  # between two lines of a command that is not on a terminal
# In messages of torch: on a GPU; on a CPU, for which it has no exception of its own.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate")
DEBUG = "--debug"
DEBUG_HELP = "Show the traceback of an error."


def print_error(message: object) -> None:
    """One red line."""
    line = " ".join(str(message).split("\n"))
    Console(stderr=True).print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def errors_in_one_line(debug: bool = False, out_of_memory: str = "") -> Iterator[None]:
    """Print errors that a user or a machine can cause in one line, without a traceback, and exit with status 1.

    A `TypeError` and the like are bugs of this project and keep their traceback.

    Args:
        debug: Raise the error with its traceback.
        out_of_memory: Advice for the user if torch runs out of memory.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError) as error:
        if debug:
            raise
        # An ImportError that is not a ModuleNotFoundError says itself what is to be installed.
        if isinstance(error, (ValueError, OSError, FloatingPointError)) or type(error) is ImportError:
            print_error(error)
        else:
            # torch says more on the lines that follow, for those who work on it.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            lacks_memory = isinstance(error, MemoryError) or any(words in first for words in OUT_OF_MEMORY)
            print_error(f"{first} ({out_of_memory if lacks_memory and out_of_memory else f'{DEBUG} shows where'})")
        raise SystemExit(1) from None


def run_command(command: Callable[..., None], out_of_memory: str = "") -> None:
    """`typer.run`, with errors in one line, or with their traceback if --debug is among the arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=f"{DEBUG}: {DEBUG_HELP}")(command)
    run_app(app, out_of_memory)


def run_app(app: typer.Typer, out_of_memory: str = "") -> None:
    """As `run_command`. --debug may stand anywhere, before a subcommand's name or behind it."""
    arguments = sys.argv[1:]
    with errors_in_one_line(DEBUG in arguments, out_of_memory):
        app([argument for argument in arguments if argument != DEBUG])


def tracked(items: Sequence[T], description: str | None) -> Iterable[T]:
    """Go through `items` with a bar on stderr; where that is no terminal, with a line now and then.

    Args:
        items: Items to iterate over.
        description: Text beside the progress bar; None shows no bar.
    """
    bar = {} if sys.stderr.isatty() else {"delay": SECONDS, "mininterval": SECONDS, "miniters": 1, "leave": False}
    return tqdm(items, description, disable=description is None, file=sys.stderr, **bar)
