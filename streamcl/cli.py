"""The command line, and nothing but the command line: each command is a few lines over the function that does it."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from streamcl.errors import ConfigError, StreamclError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A continual-learning streaming engine: describe a stream in YAML, run it, resume it, feed it, deploy it.",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped configuration (quickstart).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options to change: strategy.epochs=5")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; default runs/NAME.")] = None,
) -> None:
    """Run a scenario."""
    from streamcl import running

    running.run(config, overrides or (), out)


@app.command()
def resume(run: Run) -> None:
    """Go on after any interruption, bit for bit."""
    from streamcl import running

    status = running.resume(run)
    final = status["final"]
    typer.echo(f"{run} is done: " + ("nothing was scored" if final is None else f"final {status['metric']} {final:.4f}"))


@app.command()
def feed(
    run: Run,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file, a folder, or a source such as digits or '{name: csv, path: new.csv}'.")
    ],
    test: Annotated[str | None, typer.Option("--test", metavar="DATA", help="What to score of it, in the same forms.")] = None,
    holdout: Annotated[float, typer.Option("--holdout", min=0.0, max=0.9, help="Score this part of DATA and do not learn it.")] = 0.0,
    name: Annotated[str | None, typer.Option("--name", help="What to call the new task.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Learn it although the run has this very data already.")] = False,
) -> None:
    """New data has arrived: learn it as the next task of a finished run."""
    from streamcl import feeding

    feeding.feed(run, data, test=test, holdout=holdout, name=name, again=again)


@app.command(name="eval")
def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="Labelled data; default: the run's own test sets.")] = None,
) -> None:
    """Score a run's model."""
    from streamcl import scoring

    typer.echo(scoring.table(scoring.score(run, data)))


@app.command()
def export(run: Run, directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")]) -> None:
    """Write the model for others: weights, class names, preprocessing, licence, card."""
    from streamcl import exporting

    typer.echo(f"exported to {exporting.export(run, directory)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the accuracy curves into this PNG.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write one HTML page with all of them.")] = None,
) -> None:
    """A table of runs, side by side, and a picture."""
    from streamcl import comparing

    typer.echo(comparing.table(runs))
    if picture is not None:
        comparing.picture(runs, picture)
        typer.echo(f"picture: {picture}")
    if report is not None:
        comparing.page(runs, report)
        typer.echo(f"report: {report}")


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None, typer.Option("--over", metavar="KEY=A,B,C", help="seed=0..4, strategy=er,icarl; every combination is run.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Runs at a time; default: one for each core.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the runs go; default runs/NAME-sweep.")] = None,
) -> None:
    """Many runs on the local cores, ranked on validation; started again, it goes on where it was."""
    from streamcl import sweeping

    swept = sweeping.sweep(config, overrides or (), over or (), workers=workers, out=out)
    typer.echo(swept.table)
    raise typer.Exit(swept.exit_code)


@app.command()
def adapt(
    what: Annotated[str, typer.Argument(metavar="RUN | CONFIG", help="A run's folder, or a test-time configuration.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[DATA] [KEY=VALUE ...]", help="For a RUN the data that it meets; options to change.")
    ] = None,
    strategy: Annotated[str | None, typer.Option("--strategy", help="The method; default: tent, or what CONFIG says.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="How many samples of DATA arrive together.")] = 64,
    out: Annotated[Path | None, typer.Option("--out", help="The new run's folder; default runs/NAME-adapted.")] = None,
) -> None:
    """Serve a stream and adapt to it, under guard, beside the model as it was deployed."""
    from streamcl import adapt as adapting

    data = [word for word in words or () if "=" not in word or word.lstrip().startswith("{")]
    if len(data) > 1:
        raise ConfigError(f"{data[1]} is one thing too many: streamcl adapt takes a RUN and its DATA, or a CONFIG, and KEY=VALUE")
    overrides = [word for word in words or () if word not in data]
    typer.echo(adapting.adapt(what, data[0] if data else None, strategy=strategy, overrides=overrides, batch=batch, out=out))


@app.command()
def serve(
    run: Run,
    host: Annotated[str, typer.Option("--host", help="Where to listen; put a proxy with TLS before anything but 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any free one.")] = 8000,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="What adapts: tent, or '{name: tent, ...}'; default: the run's own, or tent.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="shadow | inline", help="Default: shadow, where the method changes weights.")
    ] = None,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="Whether a guard watches over what adapts.")] = True,
    canary: Annotated[str | None, typer.Option("--canary", metavar="DATA", help="Some labelled data by which the guard decides.")] = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", metavar="DATA", help="Data of the source, for methods that need it.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option("--tokens", metavar="FILE", help='JSON: {"predict": ..., "change": ...}.')] = None,
    publish: Annotated[
        Path | None, typer.Option("--publish", metavar="FOLDER", help="Write each version there, for others to follow.")
    ] = None,
    follow: Annotated[
        Path | None, typer.Option("--follow", metavar="FOLDER", help="Adapt nothing, and serve the versions that are published there.")
    ] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, metavar="N", help="One that adapts and N - 1 that follow it, behind one address, with Ray.")
    ] = 1,
    remember: Annotated[
        int, typer.Option("--remember", min=0, help="Samples kept in memory, on which labels that come late are compared; 0 for none.")
    ] = 256,
    inputs: Annotated[int, typer.Option("--inputs", min=0, max=100, help="Requests whose inputs are kept in memory for the page.")] = 0,
    body: Annotated[int, typer.Option("--body", min=1024, help="Bytes that a request may have.")] = 8 << 20,
    most: Annotated[int, typer.Option("--most", min=1, help="Samples that a request may have.")] = 512,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Samples that may wait to be answered, and to be learned.")] = 4096,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds after which a request is given up.")] = 10.0,
    update: Annotated[int, typer.Option("--update", min=1, help="Samples of which an update is made.")] = 64,
    sync: Annotated[bool, typer.Option("--sync", help="Wait for the disk, so that a power cut takes no sample either.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of a computation; default: half of the cores.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: the run's own.")] = None,
) -> None:
    """Serve a run's model over HTTP, adapting to what it is asked."""
    from streamcl import serving

    settings = serving.Settings(
        strategy=strategy,
        mode=mode,
        guard=guard,
        canary=canary,
        calibrate=calibrate,
        tokens=tokens,
        publish=publish,
        follow=follow,
        remember=remember,
        inputs=inputs,
        threads=threads,
        device=device,
        limits={"body": body, "most": most, "queue": queue, "timeout": timeout, "update": update, "sync": sync},
    )
    if replicas > 1:
        from streamcl.serving import on_ray

        on_ray.serve(run, host, port, replicas, settings)
    else:
        serving.serve(run, host, port, settings)


@app.command()
def forget(
    run: Run,
    ids: Annotated[Path, typer.Option("--ids", metavar="FILE", help="Sample ids: one in a line, or a JSON list.")],
) -> None:
    """Erase samples from a finished run's memory, checkpoints and pictures, with a receipt of what that covers."""
    from streamcl import forgetting

    typer.echo(forgetting.shown(forgetting.forget(run, ids)))


@app.command()
def memory(
    run: Run,
    pictures: Annotated[bool, typer.Option("--pictures", help="Also draw the exemplars and the prototypes, as PNG in RUN/memory.")] = False,
) -> None:
    """What a run remembers, and what that costs."""
    from streamcl import remembering

    typer.echo(remembering.remembered(run, pictures))


@app.command(name="list")
def list_(kind: Annotated[str | None, typer.Argument(metavar="KIND", help="scenarios, sources, strategies, terms, ...")] = None) -> None:
    """What there is, in a line each."""
    from streamcl import listing

    typer.echo(listing.listing(kind))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME | RUN | CONFIG", help="A plug-in, a run's folder, or a configuration.")],
    kind: Annotated[str | None, typer.Option("--kind", help="Which one, where several kinds have the name.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw some samples of each task of a CONFIG into this PNG, SVG or PDF.")
    ] = None,
    tasks: Annotated[int | None, typer.Option("--tasks", min=1, help="How many tasks --picture draws at most; default 12.")] = None,
) -> None:
    """What a plug-in is, its options and its paper; a run; a configuration with every default filled in, or its stream as a picture."""
    if picture is not None and kind is None:
        from streamcl import picturing

        typer.echo(picturing.picture(name, picture, tasks))
        return
    from streamcl import listing

    if picture is not None or tasks is not None:
        raise ConfigError("--picture draws the stream of a configuration: " + ("leave out --kind" if picture else "--tasks belongs to it"))
    typer.echo(listing.show(name, kind))


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="strategy | scenario")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to write it.")] = Path(),
    of: Annotated[
        str | None,
        typer.Option("--kind", metavar="learning | adapting", help="Of a strategy: learns tasks (default), or adapts to what it serves."),
    ] = None,
) -> None:
    """A working file to start from, with its configuration and its test."""
    from streamcl import scaffolding

    typer.echo(scaffolding.new(kind, name, folder, of))


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Everything that can be checked without running."""
    from streamcl import listing

    typer.echo(listing.check(config, overrides or ()))


@app.command()
def schema() -> None:
    """The JSON schema of the YAML, for editors."""
    import json

    from streamcl.schema import schema

    typer.echo(json.dumps(schema(), indent=1))


@app.command()
def version() -> None:
    """The version of streamcl."""
    from streamcl import __version__

    typer.echo(__version__)


def main() -> None:
    """Run the command; a person's mistake is one message and an exit code. With STREAMCL_DEBUG=1 its traceback is shown as well."""
    try:
        _command()
    except SystemExit as ending:
        if "streamcl.processes" in sys.modules:
            sys.modules["streamcl.processes"].leave(ending.code if isinstance(ending.code, int) else 0)
        raise


def _command() -> NoReturn:
    try:
        if sys.argv[1:2] == ["list"] and not any(word.startswith("-") for word in sys.argv[2:]) and len(sys.argv) <= 3:
            from streamcl import listing  # typer imports pydantic for any command, which takes longer than the list itself

            print(listing.listing(*sys.argv[2:]))
            sys.exit(0)
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="streamcl", standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except StreamclError as error:
        _stop(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer's own: the command is wrong
            _stop(_usage(error), 2)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _stop(f"{what}. This is a fault of streamcl: please report it, with what STREAMCL_DEBUG=1 adds to this line", 1)


def _stop(message: str, code: int) -> NoReturn:
    if os.environ.get("STREAMCL_DEBUG") == "1":
        traceback.print_exc()
    print(f"streamcl: {message}", file=sys.stderr)
    sys.exit(code)


def _usage(error: Any) -> str:
    """What is wrong with the words of a command, and where they are explained."""
    message = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx else "streamcl"
    return f"{message[:1].lower()}{message[1:]}" + ("" if "Did you mean" in message else f"; see {command} --help")


if __name__ == "__main__":
    main()
