"""The C++ compiler that a kernel for the CPU needs, and its absence."""

from __future__ import annotations


class CompilerNotFoundError(RuntimeError):
    """There is no C++ compiler on this machine, and compiling for the CPU needs one."""

    def __init__(
        self, what: str = "ft.compile", way_out: str = "leave out ft.compile: the step runs in eager as it is"
    ) -> None:
        super().__init__(
            f"{what}: no C++ compiler found, and compiling for the CPU needs one; install g++ or clang++ (or set CXX "
            f"to one), or {way_out}"
        )


def check_compiler(*words: str) -> None:
    """Raise CompilerNotFoundError(*words) where a function of tensors on the CPU would at its first call."""
    from functrain.compiler.inductor import cxx

    if not cxx.is_there():
        raise CompilerNotFoundError(*words)


def no_compiler(error: BaseException | None) -> bool:
    """Tell whether an error, or one that caused it, says that there is no C++ compiler."""
    from functrain.compiler.inductor import cxx

    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if cxx.is_missing(error):
            return True
        seen.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False
