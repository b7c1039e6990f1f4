"""Exit codes, error messages and results of the command lines of both packages."""

import contextlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from jaxensemble.errors import (
    POINTER,
    InputError,
    JaxEnsembleError,
    MemberError,
    ParityError,
    StateError,
    UnsupportedError,
)

EXIT_CODES: list[tuple[type[BaseException], int]] = [
    (ParityError, 1),
    (UnsupportedError, 4),
    (InputError, 3),
    (MemberError, 3),
    (StateError, 3),
    (ImportError, 5),
    (OSError, 6),
    (KeyboardInterrupt, 130),
]
"""Exit codes by error: 1 parity failed, 3 bad input, 4 unsupported model, 5 environment, 6 files, 130 after Ctrl-C.

Typer itself exits with 2 for wrong usage."""

X64Option = Annotated[bool, typer.Option("--x64", help="Run JAX with 64-bit types, for float64 models.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and all that errors hold.")]


def make_app(name: str, purpose: str, distributions: Sequence[str]) -> typer.Typer:
    """A command line without commands: completion, and `--version`, which also lists the given distributions."""
    app = typer.Typer(
        name=name, help=purpose, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False
    )

    def show_versions(wanted: bool) -> None:
        if wanted:
            others = ", ".join(f"{other} {installed_version(other) or 'not installed'}" for other in distributions)
            typer.echo(f"{name} {installed_version('jaxensemble') or 'unknown'} ({others})")
            raise typer.Exit

    @app.callback()
    def options(
        versions: Annotated[
            bool, typer.Option("--version", callback=show_versions, is_eager=True, help="Print versions and exit.")
        ] = False,
    ) -> None: ...

    return app


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None for a distribution that is not installed.

    >>> installed_version("no-such-distribution") is None
    True
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def use_x64(x64: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which JAX has 64-bit types on, or off."""
    import jax

    return jax.enable_x64(x64)


@contextlib.contextmanager
def report_errors(program: str, as_json: bool, debug: bool) -> Iterator[None]:
    """Prints errors as one message, and exits with their code; prints the package's own warnings as one message.

    `debug` adds the traceback.
    """
    try:
        with warnings.catch_warnings():
            _print_warnings(program)
            yield
    except (JaxEnsembleError, ImportError, OSError, KeyboardInterrupt) as error:
        details = escape_controls(error.details) if isinstance(error, JaxEnsembleError) else ""
        if debug:
            typer.echo(details, err=True)
            raise
        code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
        message = escape_controls(str(error)).replace(POINTER, "All of it: --debug") or "interrupted"
        if isinstance(error, ImportError):
            message += f"; see {program} doctor"
        if as_json:
            content = {"error": type(error).__name__, "message": message, "details": details or message}
            typer.echo(json.dumps(content, indent=2))
        typer.echo(f"{program}: {message}", err=True)
        raise typer.Exit(code) from error


def _print_warnings(program: str) -> None:
    """Prints the package's own warnings as errors, without a place in the code, until filters are reset."""
    others = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category.__module__ == JaxEnsembleError.__module__:
            typer.echo(f"{program}: {escape_controls(str(message))}", err=True)
        else:
            others(message, category, *place)

    warnings.showwarning = shown


def show_result(result: Any, as_json: bool) -> None:
    """Prints a result to standard output."""
    typer.echo(json.dumps(result, indent=2) if as_json else result)


def escape_controls(text: str) -> str:
    """Escapes all characters that control a terminal, except line breaks: text from a file could rewrite the screen.

    >>> escape_controls("conv1\\x1b[2J")
    'conv1\\\\x1b[2J'
    """
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def show_rows(total: int, first: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function that shows on standard error how many rows are done: on a terminal a bar, else lines of text."""
    started, latest = time.monotonic(), time.monotonic()
    if sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("predicting", total=total, completed=first)
            yield lambda done: progress.update(
                task, completed=done, description=rows_line(first, done, total, time.monotonic() - started)
            )
        return

    def show(done: int) -> None:
        nonlocal latest
        if time.monotonic() >= latest + 1:
            latest = time.monotonic()
            typer.echo(rows_line(first, done, total, latest - started), err=True)

    yield show


def rows_line(first: int, done: int, total: int, seconds: float) -> str:
    """A line about the rows that are done, their rate since row `first`, and the time left.

    >>> rows_line(0, 250_000, 1_000_000, 5.0)
    '250,000 of 1,000,000 rows, 50,000 a second, 15 s left'
    """
    rate = (done - first) / max(seconds, 1e-9)
    left = (total - done) / rate if rate else 0
    return f"{done:,} of {total:,} rows, {rate:,.0f} a second, {left:,.0f} s left"
