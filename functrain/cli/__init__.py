"""The command `functrain`.

Exit codes: 0 done, whether somebody read what was shown or not; 1 the training failed (too many steps in a row were
skipped as not finite, or the model is not finite at the end), `verify` found something broken, or an error of ours;
2 the command, its files or its options are wrong; 130, 143 and 129 after SIGINT, SIGTERM and SIGHUP, when the finished
step has been saved.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence

from functrain.cli import streams
from functrain_command import COMMANDS, main

EXTRA = {"tyro", "rich", "tokenizers", "tensorboard", "matplotlib"}

__all__ = ["COMMANDS", "main", "run"]


def run(words: Sequence[str]) -> int:
    """Run the command that the first word names; errors that a user can mend are one line on stderr."""
    streams.settle()
    # training goes on where nobody looks; the others have nothing to do but to be read
    with streams.enduring() if words[0] == "train" else contextlib.nullcontext():
        code = _run(words[0], words[1:])
        sys.stdout.flush()
        return code


def _run(command: str, words: Sequence[str]) -> int:
    try:
        importlib.import_module(f"functrain.cli.{command.replace('-', '_')}").main(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader, `head` say, has gone
        streams.drop(sys.stdout)
        return 1
    except KeyboardInterrupt:
        return _fail("stopped" + ("; the last checkpoint stands" if command == "train" else ""), 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA:
            raise
        return _fail(f"{command} needs the package {package!r}; install it with: pip install 'functrain[cli]'")
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
