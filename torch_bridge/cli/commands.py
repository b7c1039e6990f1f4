"""The commands of `torch-bridge`.

Commands import torch and JAX when they run, so that `doctor`, `--version` and the completion of shells work without
them.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from jaxensemble import terminal
from jaxensemble.doctor import diagnose
from jaxensemble.terminal import DebugOption, JsonOption, X64Option, show_result, use_x64
from torch_bridge.cli.ensembles import port_ensemble, show_status
from torch_bridge.cli.inputs import make_examples
from torch_bridge.cli.options import (
    CheckOption,
    EnsembleOptions,
    ForceOption,
    NetworkOptions,
    NonfiniteOption,
    OutOption,
    SaveOption,
    expand_options,
)

if TYPE_CHECKING:
    import torch

app = terminal.make_app(
    "torch-bridge", "Port PyTorch ensembles to Flax, and prove that they agree.", ("jax", "flax", "torch")
)

PICTURES = (".png", ".svg", ".pdf", ".jpg")


@app.command()
@expand_options(EnsembleOptions)
def port(
    options: EnsembleOptions,
    mode: Annotated[
        Literal["eval", "train", "as_is"], typer.Option(help="The mode to port in; as_is: as the factory leaves it.")
    ] = "eval",
    out: OutOption = None,
    force: ForceOption = False,
    check: CheckOption = True,
    allow_nonfinite: NonfiniteOption = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Port an ensemble and prove that it gives what PyTorch gives. Only then it is saved."""
    with _report_errors(as_json, debug), use_x64(x64):
        from jaxensemble.artifact.saving import check_artifact_path
        from jaxensemble.files.schema import to_plain
        from jaxensemble.network.sources import describe_sources

        if out is not None:
            check_artifact_path(out, force=force)
        ensemble, _ = port_ensemble(options, 2, mode=mode, check=check, allow_nonfinite=allow_nonfinite)
        if out is not None:
            ensemble.save(out, force=force)
        result = {"ensemble": repr(ensemble), "members": len(ensemble), "passed": True if ensemble.proof else None}
        verdict = "agrees with PyTorch" if ensemble.proof else "NOT compared with PyTorch"
        result |= {"out": str(out) if out else None, "sources": to_plain(ensemble.sources)}
        saved = f"; saved to {out}" if out else ""
        lines = [f"{ensemble!r}: {verdict}{saved}", *describe_sources(ensemble.sources or ())]
        show_result(result if as_json else terminal.escape_controls("\n".join(lines)), as_json)


@app.command()
@expand_options(EnsembleOptions)
def check(
    options: EnsembleOptions,
    save: SaveOption = None,
    train: Annotated[bool, typer.Option("--train", help="Compare ten training steps, too.")] = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare an ensemble with PyTorch thoroughly, and print the table. Exits with 1 where they differ."""
    with _report_errors(as_json, debug), use_x64(x64):
        from torch_bridge import parity

        _check_folders(save)
        ensemble, models = port_ensemble(options, 2, check=False)
        with show_status("comparing with PyTorch"):
            report = parity.check(models(), ensemble, *make_examples(options.inputs, options.seed), train=train)
        show_result(report.to_json() if as_json else str(report), as_json)
        if save is not None:
            report.save(save)
        if not report.passed:
            raise typer.Exit(1)


@app.command()
@expand_options(EnsembleOptions)
def bench(
    options: EnsembleOptions,
    dtype: Annotated[str, typer.Option(help="What both compute in: float32, bfloat16, float16 or float64.")] = "",
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="One of PyTorch's ways; all without. Repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of calls for every way.")] = 10,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let both round float32 products to TF32.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Time a training step, of Adam, not a prediction.")] = False,
    save: SaveOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the times into this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time an ensemble beside every way that PyTorch has of running it, on this device."""
    with _report_errors(as_json, debug), use_x64(x64):
        from torch_bridge.graph.examples import map_tensors
        from torch_bridge.timing import time

        _check_folders(save, plot)
        if plot is not None and plot.suffix not in PICTURES:
            raise typer.BadParameter(
                f"expected a file ending in {', '.join(PICTURES)}; got {plot}", param_hint="--plot"
            )
        kind = _parse_dtype(dtype) if dtype else None
        ensemble, models = port_ensemble(options, 10, check=False)
        made, examples = models(), make_examples(options.inputs, options.seed)
        if kind is not None:
            ensemble, made = ensemble.astype(dtype), [model.to(kind) for model in made]
            examples = map_tensors(lambda x: x.to(kind) if x.is_floating_point() else x, examples)
        with Console(stderr=True).status("timing") as status:
            report = time(
                made, ensemble, examples.positional, examples.named,
                variants=variants, rounds=rounds, tf32=tf32, train=train, progress=status.update,
            )  # fmt: skip
        show_result(report.to_json() if as_json else report.to_markdown() if markdown else str(report), as_json)
        if save is not None:
            report.save(save)
        if plot is not None:
            report.plot(plot)


def _parse_dtype(dtype: str) -> "torch.dtype":
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise typer.BadParameter(f"expected a floating-point dtype; got {dtype!r}", param_hint="--dtype")
    return kind


def _check_folders(*paths: Path | None) -> None:
    """Checks that results can be written before they are computed.

    **Raises:** `FileNotFoundError` for directories that do not exist.
    """
    missing = sorted({str(path.parent) for path in paths if path is not None and not path.parent.is_dir()})
    if missing:
        raise FileNotFoundError(f"there is no directory {', '.join(missing)} to write to: make it first")


@app.command()
@expand_options(NetworkOptions)
def source(
    options: NetworkOptions,
    x64: X64Option = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the Flax source of a network."""
    with _report_errors(as_json, debug), use_x64(x64):
        ensemble, _ = port_ensemble(EnsembleOptions(**vars(options)), 1, check=False)
        show_result({"source": ensemble.source()} if as_json else ensemble.source().rstrip("\n"), as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the pictures.")] = Path("demo"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train ensembles on handwritten digits in PyTorch, port them, prove it, and look at their uncertainty."""
    with _report_errors(as_json, debug):
        from torch_bridge import demo as demonstration

        figures = demonstration.run(out, quiet=as_json)
        if as_json:
            show_result(figures, as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, whether it works, and what to do. Exits with 1 where something will not work."""
    from torch_bridge.doctor import CHECKS

    with _report_errors(as_json, debug=False):
        diagnose(CHECKS, as_json)


def main() -> None:
    """Runs the `torch-bridge` command."""
    app(prog_name="torch-bridge")  # also for `python -m`: otherwise the shell would complete `python` itself


def _report_errors(as_json: bool, debug: bool) -> contextlib.AbstractContextManager[None]:
    return terminal.report_errors("torch-bridge", as_json, debug)
