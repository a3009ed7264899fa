"""What torch's compiler says of the C++ compiler."""

from __future__ import annotations

from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler


def is_there() -> bool:
    """Tell whether kernels for the CPU can be compiled."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def is_missing(error: BaseException) -> bool:
    """Tell whether an error says that there is none."""
    return isinstance(error, InvalidCxxCompiler)
