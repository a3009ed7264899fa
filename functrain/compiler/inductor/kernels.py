"""The C++ kernels of a program as one library.

torch's compiler makes a file of each kernel, and half of the time in which a file is compiled goes into reading torch's
header, also where that is compiled before. Here kernels of one program share a file, fewer where there are more cores
to work side by side.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch._inductor import config
from torch._inductor.codecache import (
    _HEADER_DIR,
    CppPythonBindingsCodeCache,
    _get_cpp_prefix_header,
    _precompile_header,
    get_lock_dir,
    write,
)
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.utils._filelock import FileLock


class Kernel(NamedTuple):
    """A C++ function named `kernel`."""

    types: Sequence[str]  # of its arguments
    code: str


def libraries(kernels: Sequence[Kernel], cores: int) -> list[list[int]]:
    """Return which kernels go into one library."""
    size = max(1, 16 // cores)
    joined = [i for i, kernel in enumerate(kernels) if _ALONE.match(kernel.code)]
    others = [[i] for i, kernel in enumerate(kernels) if not _ALONE.match(kernel.code)]
    return [*[joined[i : i + size] for i in range(0, len(joined), size)], *others]


def load(kernels: Sequence[Kernel], header: Callable[[], str | None]) -> list[Callable[..., Any]]:
    """Return the functions of a library, which is compiled if torch's cache folder does not have it. `header` waits for
    the path of the compiled header."""
    key, source = write(_text(kernels), "main.cpp", extra=_command())
    library = Path(source).with_suffix(".so")
    if not library.exists():
        with FileLock(os.path.join(get_lock_dir(), key + ".lock"), timeout=_WAIT):
            if not library.exists():
                _build(source, library, header())
    module = CppPythonBindingsCodeCache._load_library(str(library), key)
    return [getattr(module, f"kernel_{i}") for i in range(len(kernels))]


def has_headers() -> bool:
    """Tell whether a header of torch's has ever been compiled on this machine."""
    return os.path.isdir(_HEADER_DIR)


def compile_header() -> str | None:
    """Compile torch's header for the kernels, if it is not there, and return its path; None where torch is told not to
    compile headers."""
    if not config.cpp_cache_precompile_headers:
        return None
    return _precompile_header(_get_cpp_prefix_header("cpu"), _command(), **_options())


_WAIT = 600.0  # s, for another process that compiles the same


def _build(source: str, library: Path, header: str | None) -> None:
    options = CppTorchDeviceOptions(**_options())
    options.precompiled_header = header
    name = f"{library.stem}.{os.getpid()}.{threading.get_ident()}"
    builder = CppBuilder(name=name, sources=source, BuildOption=options, output_dir=str(library.parent))
    builder.build()
    os.replace(builder.get_target_file_path(), library)  # a process that dies leaves none that is half written


def _options() -> dict[str, Any]:
    return {**CppPythonBindingsCodeCache.cpp_compile_command_flags, "vec_isa": pick_vec_isa(), "device_type": "cpu"}


@cache
def _command() -> str:
    options = CppTorchDeviceOptions(**_options())
    return str(CppBuilder(name="o", sources="i", BuildOption=options).get_command_line())


# one function after torch's header, and nothing that another file could have, too
_ALONE = re.compile(
    r'\s*#include <torch/csrc/inductor/cpp_prefix\.h>\s*extern "C"\s+void\s+kernel\(((?!#include).)*\Z', re.S
)


def _text(kernels: Sequence[Kernel]) -> str:
    """Return the file: the functions under names of their own, and torch's binding to Python of each."""
    template = CppPythonBindingsCodeCache.suffix_template
    start, function = template.split("static PyObject* {entry_func}_py", 1)
    function, end = function.split("static PyMethodDef", 1)
    line = '{{"{entry_func}", {entry_func}_py, METH_VARARGS, ""}},'
    before, after = end.split(line)
    codes, functions, lines = [], [], []
    for i, kernel in enumerate(kernels):
        name = f"kernel_{i}"
        codes.append(re.sub(r"\bkernel\(", f"{name}(", kernel.code, count=1))
        types = [kind.replace("const ", "") for kind in kernel.types]
        given = ", ".join([f"parse_arg<{kind}>(args, {n})" for n, kind in enumerate(types)])
        binding = "static PyObject* {entry_func}_py" + function
        call = f"{name}({given}); Py_RETURN_NONE;"
        functions.append(binding.format(entry_func=name, arg_len=len(types), call_entry_func=call))
        lines.append(line.format(entry_func=name))
    head, tail = start.format(entry_func="kernel", extra_parse_arg=""), after.format(entry_func="kernel")
    table = "static PyMethodDef" + before.format() + "\n".join(lines)
    return "\n".join([*codes, head, *functions, table + tail])
