"""Every private name of torch that the library uses is written down here, with what needs it, and is still there."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import functrain as ft

WHY = {
    "torch._C.DispatchKey.CompositeImplicitAutograd": "see torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._C.DispatchKey.Functionalize": "see torch._C._ExcludeDispatchKeyGuard",
    "torch._C.DispatchKeySet": "see torch._C._ExcludeDispatchKeyGuard",
    "torch._C.DisableTorchFunction": "a gradient of ours begins also where a module's own requires_grad_ does nothing",
    "torch._C._DisableTorchDispatch": "a result like an earlier one, made without asking torch for its shape",
    "torch._C._ExcludeDispatchKeyGuard": "writes turned into values in Python alone, where a trace sees them",
    "torch._C._autograd._saved_tensors_hooks_get_disabled_error_message": "whether torch's checkpoint may run here",
    "torch._C._autograd._top_saved_tensors_default_hooks": "whether a checkpoint outside counts what is saved",
    "torch._C._dispatch_has_kernel": "whether the dispatcher knows an operation",
    "torch._C._dispatch_has_kernel_for_dispatch_key": "whether an operation is made of others",
    "torch._C._current_graph_task_id": "whether the backward pass runs, by which a rehearsal tells what memory is of",
    "torch._C._functorch": "what torch.func knows of a tensor, for a clear error about one that a function captured",
    "torch._C._functorch.TransformType.Grad": "see torch._C._functorch",
    "torch._C._functorch.TransformType.Jvp": "see torch._C._functorch",
    "torch._C._functorch.TransformType.Vmap": "see torch._C._functorch",
    "torch._C._functorch.get_interpreter_stack": "see peek_interpreter_stack",
    "torch._C._functorch.get_unwrapped": "see torch._C._functorch",
    "torch._C._functorch.is_batchedtensor": "see torch._C._functorch",
    "torch._C._functorch.is_functorch_wrapped_tensor": "see torch._C._functorch",
    "torch._C._functorch.maybe_get_level": "see torch._C._functorch",
    "torch._C._functorch.peek_interpreter_stack": "the only way to see a torch.func transform that the caller applied",
    "torch._dynamo.convert_frame.compile_lock": "one thread compiles at a time, torch.compile's included",
    "torch._from_functional_tensor": "see FunctionalTensorMode",
    "torch._functionalize_has_data_mutation": "whether a traced function has written into an argument",
    "torch._functorch.config": "what the partitioner keeps, scoped",
    "torch._functorch.partitioners": "the graph of a function and its gradient, split in two",
    "torch._guards.TracingContext": "what is compiled has its trace's fake tensors, or torch keeps nothing on disk",
    "torch._guards.tracing": "a trace or a compilation that leaves the one that is going on",
    "torch._inductor.async_compile.AsyncCompile": "kernels of several graphs compiled side by side",
    "torch._inductor.async_compile.get_compile_threads": "how many kernels are compiled side by side",
    "torch._inductor.codecache.CppPythonBindingsCodeCache": "the binding of a C++ kernel to Python",
    "torch._inductor.codecache._HEADER_DIR": "see _precompile_header",
    "torch._inductor.codecache._get_cpp_prefix_header": "see _precompile_header",
    "torch._inductor.codecache._precompile_header": "the header of the kernels, begun beside the tracing",
    "torch._inductor.codecache.get_lock_dir": "two processes do not compile the same file",
    "torch._inductor.codecache.write": "a file in torch's cache folder, under a hash of what it holds",
    "torch._inductor.codegen.cpp.CppScheduling": "a fusion that reads before a write is refused",
    "torch._inductor.compile_fx._recursive_joint_graph_passes": "what torch does with such a graph before it is split",
    "torch._inductor.compile_fx.compile_fx_inner": "a graph compiled without Dynamo, whose guards cost 50 us a call",
    "torch._inductor.config": "options of one compilation, scoped",
    "torch._inductor.cpp_builder.CppBuilder": "the command that compiles a C++ kernel",
    "torch._inductor.cpp_builder.CppTorchDeviceOptions": "see CppBuilder",
    "torch._inductor.cpp_builder.get_cpp_compiler": "whether there is a C++ compiler, before a run writes anything",
    "torch._inductor.cpu_vec_isa.VecISA": "the check of a kind of vectors that torch itself was built for, left out",
    "torch._inductor.cpu_vec_isa.pick_vec_isa": "see CppBuilder",
    "torch._inductor.cpu_vec_isa.supported_vec_isa_list": "the checks of the CPU, run beside the tracing",
    "torch._inductor.cpu_vec_isa.x86_isa_checker": "see supported_vec_isa_list",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "a pass whose code is part of the cache's key",
    "torch._inductor.custom_graph_pass.get_hash_for_files": "see CustomGraphPass",
    "torch._inductor.decomposition.select_decomp_table": "the operations that torch's compiler takes",
    "torch._inductor.exc.InvalidCxxCompiler": "how torch says that there is no compiler",
    "torch._inductor.fx_passes.joint_graph": "patterns of attention are not prepared where there is none to find",
    "torch._inductor.ir.Pointwise": "see register_lowering",
    "torch._inductor.lowering.broadcast_tensors": "see register_lowering",
    "torch._inductor.lowering.make_pointwise": "see register_lowering",
    "torch._inductor.lowering.register_lowering": "the hash of a draw as one loop, which torch would make 150 nodes of",
    "torch._inductor.virtualized.ops": "see register_lowering",
    "torch._inductor.lowering.make_fallback": "a product that is added in place is called as it is",
    "torch._ops.OpOverload": "the type of an operation in a traced graph",
    "torch.distributed._local_tensor.LocalTensor": "see LocalTensorMode",
    "torch.distributed._local_tensor.LocalTensorMode": "all ranks of a plan in one process, where its law is tested",
    "torch.testing._internal.distributed.fake_pg.FakeStore": "a group of ranks that are not there, for a rehearsal",
    "torch._subclasses.fake_tensor.DataDependentOutputException": "how torch says that a trace reads numbers",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException": "see DataDependentOutputException",
    "torch._subclasses.fake_tensor.FakeTensor": "see FakeTensorMode",
    "torch._subclasses.fake_tensor.FakeTensorMode": "a function run on tensors without data",
    "torch._subclasses.functional_tensor.FunctionalTensor": "see FunctionalTensorMode",
    "torch._subclasses.functional_tensor.FunctionalTensorMode": "writes as new values, also in an autograd.Function",
    "torch._sync": "see FunctionalTensorMode",
    "torch._to_functional_tensor": "see FunctionalTensorMode",
    "torch._weight_norm": "what a module's weight normalization calls, whose second derivative is wrong",
    "torch.autograd.forward_ad._current_level": "whether dual numbers are about, of which nothing is written over",
    "torch.utils._filelock.FileLock": "see get_lock_dir",
    "torch.compiler._is_compiling_flag": "what modules ask before they look at the numbers in a mask",
    "torch.utils._python_dispatch.TorchDispatchMode": "operations as they are below every transform",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": "whether nobody sees operations before the trace",
    "torch.utils._python_dispatch._disable_current_modes": "a kernel compiled while tensors are traced",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "whether a tensor, as a DTensor, wraps a plain one",
}


def private_names() -> Iterator[str]:
    for file in Path(ft.__file__).parent.rglob("*.py"):
        found = ast.parse(file.read_text())
        inner = {id(node.value) for node in ast.walk(found) if isinstance(node, ast.Attribute)}
        for node in ast.walk(found):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                yield from (
                    f"{node.module}.{alias.name}" for alias in node.names if "._" in f"{node.module}.{alias.name}"
                )
            elif isinstance(node, ast.Import):
                yield from (
                    alias.name for alias in node.names if alias.name.startswith("torch.") and "._" in alias.name
                )
            elif isinstance(node, ast.Attribute) and id(node) not in inner:
                name = re.sub("^_functorch", "torch._C._functorch", ast.unparse(node))
                if name.startswith("torch.") and "._" in name and "__" not in name:
                    yield name


def there(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_private_name_of_torch_has_a_reason_and_is_there() -> None:
    used = set(private_names())
    assert used == set(WHY), "a private name needs a reason here, and a reason a name"
    assert {name for name in used if not there(name)} == set()
