"""The command line. Thin: every command parses, calls the library and prints; torch is imported only when it works."""

from __future__ import annotations

import errno
import os
import sys
import time

# Before anything imports torch: OpenMP threads that wait should spin for some microseconds, then sleep. Spinning for long, as is
# the default, made the training of small heads more than five times slower on a machine that others use too; sleeping at once
# makes it half as fast on a quiet one.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import typer

from rice_eval import __version__
from rice_eval.cli import (
    bank,
    catalogue,
    curve,
    data,
    encoders,
    evaluate,
    mllm,
    reference,
    referring,
    report,
    results,
    sweep,
)
from rice_eval.environment import launched
from rice_eval.errors import RiceEvalError, one_line

__all__ = ["app", "main"]

app = typer.Typer(
    name="rice-eval",
    help="The evaluation harness for dense vision encoders: one pass over the images, one strict record, one gate.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_INTERRUPTED = 130
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EROFS, errno.EPERM), "check the permissions"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "give another path"),
    **dict.fromkeys((errno.ELOOP, errno.ENXIO, errno.ENODEV), "give another path"),
    errno.EIO: "check the disk",
}
"""What the file system may say that is no fault of the program, and what to do then."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rice-eval {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


evaluate.register(app)
mllm.register(app)
reference.register(app)
referring.register(app)
catalogue.register(app)
results.register(app)
report.register(app)
curve.register(app)
sweep.register(app)
app.add_typer(encoders.app, name="encoders", help="Look into checkpoints and convert them.")
app.add_typer(bank.app, name="bank", help="The bank of tokens: list, verify, prune.")
app.add_typer(data.app, name="data", help="Make and check datasets.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and exit: 0 done, 1 a gate failed, 2 something the user can mend, 130 interrupted."""
    try:
        code = app(args=argv, standalone_mode=False)
        if code == _INTERRUPTED:  # Typer makes this of Ctrl-C
            raise KeyboardInterrupt
    except RiceEvalError as error:
        _say(str(error))
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted; run the same command again to go on from the bank")
        code = _INTERRUPTED
    except SystemExit as end:
        # Typer ends with 1 where the reader of a pipe (head, less) closed it: that is not an error.
        cause = end.__context__
        code = 0 if isinstance(cause, OSError) and cause.errno == errno.EPIPE else end.code
    except BrokenPipeError:
        # The reader of a pipe (head, less) closed it: that is not an error.
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" ({error.filename})" if error.filename else ""
        fix = _DISK[error.errno]
        _say(f"{one_line(error.strerror or str(error))}{where}; {fix} and run the same command again")
        code = 2
    except Exception as error:
        # Typer's usage errors: their class moved from click into typer, so they are known by what they can do.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "rice-eval"
        _say(f"{one_line(message()).rstrip('.')}; see {path} --help")
        code = 2
    sys.exit(int(code or 0))


def _say(text: str) -> None:
    rank = launched()[0]
    torch = sys.modules.get("torch")
    if rank > 0 and (torch is None or not torch.distributed.is_initialized()):
        # Every process of torchrun meets this error, and the first one says it. torchrun ends them all as soon as one ends.
        time.sleep(5)
        return
    print(f"error{f' (process {rank})' if rank else ''}: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
