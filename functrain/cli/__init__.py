"""The command `functrain`.

Exit codes: 0 done; 1 the training failed (too many steps in a row were skipped as not finite), `verify` found something
broken, or an error of ours; 2 the command, its files or its options are wrong; 130 and 143 after SIGINT and SIGTERM,
when the finished step has been saved.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import functrain

COMMANDS = {
    "train": "pre-train a GPT on text, or go on with a run that was stopped",
    "generate": "let a run's model continue a prompt",
    "verify": "read every byte of a run's checkpoints, or of a file, and say what is broken",
    "export": "write a run's model as a folder that transformers loads",
    "inspect": "show what a run, a checkpoint or a safetensors file holds",
    "plot": "draw the learning curves of runs",
}
EXTRA = {"tyro", "rich", "tokenizers", "tensorboard", "matplotlib"}
USAGE = "usage: functrain COMMAND [OPTIONS]\n\n" + "".join(f"  {n:10}{what}\n" for n, what in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that a user can mend are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE + "\n`functrain COMMAND --help` tells more.", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"functrain {functrain.__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _fail(f"no command {words[0]!r}; there are {', '.join(COMMANDS)}")
    try:
        importlib.import_module(f"functrain.cli.{words[0]}").main(words[1:])
    except BrokenPipeError:
        # the reader, `head` say, has gone: leave nothing for Python to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("stopped; the last checkpoint stands", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA:
            raise
        return _fail(f"{words[0]} needs the package {package!r}; install it with: pip install 'functrain[cli]'")
    except Exception as error:
        from functrain.cli.failures import explain

        code, text = explain(error)
        if text is None:
            raise
        return _fail(text, code)
    except SystemExit as error:
        text = str(error)
        if type(error) is not SystemExit:
            _fail(f"{text}; the same command goes on from there")
        return error.code if isinstance(error.code, int) else 1
    return 0


def _fail(text: str, code: int = 2) -> int:
    print(f"functrain: {text}", file=sys.stderr)
    return code
