"""Every private PyTorch API the project uses: torch may change these without notice, and a new one is tried here first.

One file, hence the length: what a new torch breaks is found, and mended, by reading this one.

``torch._inductor`` and ``torch._dynamo`` are imported inside the functions: they cost seconds, and ``import deepfuse``
must not pay for them.
"""

import contextlib
import datetime
import os
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx


def flash_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention on a CPU, with its statistics (the public function keeps them to itself).

    Args:
        q: ``[B, H, Q, D]``; the last dimension of it, ``k`` and ``v`` must be contiguous: else the numbers are wrong.
        k: ``[B, H, K, D]``, dtype of ``q``.
        v: ``[B, H, K, D]``, dtype of ``q``; as wide as the keys.
        scale: of the scores.
        causal: masks by ``row >= column``, which is bottom-right aligned only where Q is K.
        mask: ``[Q, K]`` in the dtype of ``q``, added to the scores; excludes ``causal``.

    Returns:
        ``out [B, H, Q, D]`` and ``lse [B, H, Q]``, float32 or wider.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def flash_attention_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``flash_attention_cpu`` with respect to ``q``, ``k`` and ``v``."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def schema_parameters(schema: str) -> list[str]:
    """Names of the arguments of a schema, which is not registered.

    Raises:
        RuntimeError: it is no schema.
    """
    return [argument.name for argument in torch._C.parse_schema(schema).arguments]


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors, real or fake, that share their memory while both live."""
    return int(tensor.untyped_storage()._cdata)


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What Inductor decomposes before its own passes run."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def named_size(name: str) -> Any:
    """A symbol of sympy's for a size."""
    import sympy  # type: ignore[import-untyped]

    return sympy.Dummy(name, integer=True, positive=True)


def value_of_expression(expression: Any, symbols: Mapping[Any, Any]) -> Any:
    """A size (an expression of sympy's), computed by Python's operators from the values of its symbols."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, dict(symbols), expression)


def expression_of(size: torch.SymInt) -> Any:
    """The expression of sympy's that a symbolic size stands for."""
    return size.node.expr


def number_of(size: torch.SymInt, known: Mapping[Any, int], otherwise: int) -> int:
    """A symbolic size as a number: of its symbols ``known`` first, then what they were traced with, then ``otherwise``."""
    expression = size.node.expr
    shapes: Any = size.node.shape_env
    traced = shapes.backed_var_to_val
    values = {s: known.get(s, traced.get(s, otherwise)) for s in expression.free_symbols}
    return int(expression.xreplace(values))


def pin(graph: fx.Graph, after: Mapping[fx.Node, list[fx.Node]]) -> None:
    """Have Inductor's scheduler keep an order that no data ask for.

    Args:
        graph: of a graph module, before Inductor lowers it; verified no more: the nodes are wrapped.
        after: a call -> calls that come before it.
    """
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    preserve_node_ordering(graph, {node: OrderedSet(before) for node, before in after.items() if before})


_ON_CODE = "deepfuse_on_code"


def on_code(graph: fx.Graph, fn: Callable[[str], None]) -> None:
    """Call ``fn`` with Inductor's Python for a graph, when it is written; with :func:`capture` or :func:`compile_inner`."""
    graph.owning_module.meta[_ON_CODE] = fn  # type: ignore[union-attr]


CPP_FLAGS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
"""A product and its sum in one instruction, as on GPUs: decode on a CPU is 15 to 25% faster (60M parameters, AVX-512)."""


def inductor_options(hooks: Mapping[str, Callable[[fx.Graph], None]], key: str) -> dict[str, Any]:
    """Options for ``torch.compile`` that call functions on the graph of this compilation only.

    Args:
        hooks: ``joint``, ``partitioned`` or ``last`` -> what to call there.
        key: enters Inductor's cache key; must change whenever a hook would rewrite differently.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Hook(CustomGraphPass):
        def __init__(self, name: str, fn: Callable[[fx.Graph], None]):
            self.name, self.fn = name, fn

        def __call__(self, graph: fx.Graph) -> None:
            self.fn(graph)

        def uuid(self) -> str:
            return f"{self.name}:{key}"

        def __reduce__(self) -> Any:
            # caches pickle the configuration; a hook is its key
            return (str, (self.uuid(),))

    names = {
        "joint": "joint_custom_pre_pass",
        "partitioned": "post_grad_custom_pre_pass",
        "last": "post_grad_custom_post_pass",
    }
    return CPP_FLAGS | {names[name]: Hook(name, fn) for name, fn in hooks.items()}


def materialize(x: Tensor) -> Tensor:
    """Have Inductor compute ``x`` once, into memory, and not again in every loop that reads it.

    Args:
        x: of known sizes; comes out contiguous.
    """
    from torch._inductor import inductor_prims

    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return inductor_prims.force_stride_order(x, strides)


def default_inductor_folder() -> str:
    """Where Inductor keeps its code unless ``TORCHINDUCTOR_CACHE_DIR`` says otherwise."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.path.abspath(default_cache_dir())


def uncompiled_backend(
    run: Callable[[str, fx.GraphModule], None],
    finish: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda gm: gm,
    *,
    at_once: bool = False,
) -> Callable[..., Any]:
    """A ``torch.compile`` backend that rewrites the graph as Inductor's hooks would, and runs it as it is.

    Args:
        run: called with ``joint``, ``partitioned`` and ``last`` in turn, on the graph after differentiation.
        finish: makes of the rewritten graph what is called with its inputs.
        at_once: whether the backward graph is made with the forward one, rather than when it is first called.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def compile_graph(gm: fx.GraphModule, example_inputs: Any) -> Any:
        for hook in ("joint", "partitioned", "last"):
            run(hook, gm)
        gm.recompile()
        return make_boxed_func(finish(gm))

    backend: Any = aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        inference_compiler=compile_graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=dict(inductor_decompositions()),
        keep_inference_input_mutations=True,
    )
    return _graphs_at_once()(backend) if at_once else backend


@contextlib.contextmanager
def _graphs_at_once() -> Iterator[None]:
    """Inside, the backward graph is compiled with the forward one, and neither comes out of AOTAutograd's cache, past us."""
    import torch._functorch.config

    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        yield


class _Traced(Exception):
    """The graphs are known: nothing is to run."""


def traced(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[fx.GraphModule]:
    """The graphs that a call of ``fn`` would have: forward, and backward where it has gradients. Nothing runs.

    In the dialect that the hooks of :func:`inductor_options` see, which have not been called.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    found: list[fx.GraphModule] = []

    def inference(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        raise _Traced

    def partition(joint: fx.GraphModule, joint_inputs: Any, **settings: Any) -> Any:
        found.extend(min_cut_rematerialization_partition(joint, joint_inputs, **settings))
        raise _Traced

    backend = aot_autograd(
        fw_compiler=inference,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=dict(inductor_decompositions()),
        keep_inference_input_mutations=True,
    )
    try:
        torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=backend)(*args)
    except Exception as error:
        # Dynamo makes one of its own of ours, another in each torch
        if not isinstance(backends_error(error), _Traced):
            raise
    return found


def compile_inner(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Mapping[str, Any],
    heard: Callable[[str], None] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's with Inductor, under these options; its code says its sites, as that of :func:`capture`.

    Args:
        heard: called with the code of each graph before any of them runs, also where Inductor has kept it.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # around each graph: the backward one is compiled when it is called for the first time
    noted: Any = _sites_in_code()(compile_fx_inner)

    def inner(*args: Any, **kwargs: Any) -> Any:
        compiled = noted(*args, **kwargs)
        if heard is not None:
            heard(getattr(compiled, "source_code", ""))
        return compiled

    with contextlib.nullcontext() if heard is None else _graphs_at_once():
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=dict(options))
    return compiled


def backends_error(error: BaseException) -> BaseException:
    """What a backend of ``torch.compile`` raised, where Dynamo has made an error of its own of it."""
    inner: BaseException = getattr(error, "inner_exception", error)
    return inner


def mark_unbacked(tensor: Tensor, dim: int) -> None:
    """Let a compiled graph serve every size of this dimension, 0 and 1 included."""
    import torch._dynamo

    torch._dynamo.decorators.mark_unbacked(tensor, dim)


@contextlib.contextmanager
def sizes_from_data() -> Iterator[None]:
    """Inside, what a graph reads out of tensors (``tolist``) is a symbol of it when it is captured, and no break."""
    import torch._dynamo

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


def with_own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    Dynamo keeps compiled graphs with the code object: those of a function compiled for many models would be looked
    through at each call, and count together against its limit of 8.
    """
    method = fn if isinstance(fn, types.MethodType) else None
    plain: Any = fn if method is None else method.__func__
    copy = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = plain.__kwdefaults__, plain.__qualname__, plain.__module__
    return copy if method is None else types.MethodType(copy, method.__self__)


def dynamo_counters() -> dict[str, int]:
    """Since the process began: graphs captured, graph breaks, and recompilations."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
    }


def capture(
    fn: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Callable[..., Any], bytes]:
    """Capture and compile ``fn`` for these arguments, ahead of its first call.

    The result makes no checks at a call: the caller answers for shapes and dtypes. Sizes marked with
    :func:`mark_unbacked` are free. The sites of the nodes (``node.meta[SITE]``) stand in comments of Inductor's code.

    Returns:
        The compiled function and its bytes for :func:`load_captured`.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(enable_aot_compile=True), _sites_in_code():
        # checking the sizes of all weights at each call took 5% of a decode step (60M parameters in bfloat16, CPU)
        options = {**options, "size_asserts": False}
        lazy: Any = torch.compile(fn, fullgraph=True, dynamic=False, options=options)
        compiled = lazy.aot_compile((args, {}))
    compiled.disable_guard_check()
    return compiled, type(compiled).serialize(compiled).serialized_data


SITE = "deepfuse_site"
"""Entry of ``node.meta`` in a lowered graph: the number of the node's site."""
SITE_TEXT = "deepfuse_site_text"
"""Entry beside it: what there is to say of the site, in one line."""
NOTED = "# deepfuse site:"
"""Begins the comment with the text of a site in Inductor's Python, before the first kernel that computes it."""
KERNEL = "# deepfuse kernel:"
"""Begins the comment before each call of a kernel in Inductor's Python: the sites of its parts, ``|`` between them.

A part's own sites, of the nodes it computes into memory, and behind ``/`` those it computes on the way: ``3+4/1+2``.
"""
COLLECTIVES = "_c10d_functional"
"""Namespace of the collectives that stand in graphs."""
collectives: Any = getattr(torch.ops, COLLECTIVES)
"""The collectives themselves: without gradients, start and wait apart."""
PART = "// deepfuse part"
"""Stands before each part of a C++ kernel, a nest of loops. It is the same everywhere: equal kernels stay one."""


_REPLACING = threading.RLock()
"""Held while methods of Inductor's are replaced: of two threads, the second would keep the first one's for Inductor's."""


@contextlib.contextmanager
def _sites_in_code() -> Iterator[None]:
    """Inside, Inductor writes comments into its code that say which sites a kernel computes."""
    with _REPLACING, _inductor_comments():
        yield


@contextlib.contextmanager
def _inductor_comments() -> Iterator[None]:
    from torch._inductor import ir
    from torch._inductor.codegen.cpp import CppScheduling, KernelGroup
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    codegen = GraphLowering.codegen
    finalize, comment = KernelGroup.finalize_kernel, CppScheduling.codegen_comment
    triton, extern = TritonScheduling.codegen_comment, ir.ExternKernel.codegen_comment

    def finalize_kernel(self: Any, new_kernel: Any, nodes: Any) -> None:
        self.loops_code.writeline(PART)
        self.deepfuse_parts = [*getattr(self, "deepfuse_parts", ()), [n.node for n in nodes]]
        finalize(self, new_kernel, nodes)

    def codegen_comment(self: Any, node_schedule: Any, kernel_name: Any = None) -> None:
        comment(self, node_schedule, kernel_name)
        grouped = node_schedule is self.kernel_group.scheduled_nodes
        # another thread's compilation may have begun before ours
        of_group = getattr(self.kernel_group, "deepfuse_parts", [])
        parts = of_group if grouped else [[n.node for n in node_schedule]]
        _write_sites(V.graph.wrapper_code, parts)

    def triton_comment(self: Any, node_schedule: Any, kernel_name: Any = None) -> None:
        triton(self, node_schedule, kernel_name)
        # between the nodes stand marks, of where a reduction begins and ends; a combined kernel has nodes of nodes
        nodes = [leaf for node in node_schedule if hasattr(node, "get_nodes") for leaf in node.get_nodes()]
        _write_sites(V.graph.wrapper_code, [[n.node for n in nodes]])

    def extern_comment(self: Any, wrapper: Any, kernel_name: Any = None) -> None:
        extern(self, wrapper, kernel_name)
        _write_sites(wrapper, [[self]])

    def codegen_graph(self: Any) -> Any:
        code = codegen(self)
        listener = self.module.meta.get(_ON_CODE)
        if listener is not None:
            listener(code[0].value)
        return code

    replaced: tuple[tuple[type, str, Any, Any], ...] = (
        (GraphLowering, "codegen", codegen, codegen_graph),
        (KernelGroup, "finalize_kernel", finalize, finalize_kernel),
        (CppScheduling, "codegen_comment", comment, codegen_comment),
        (TritonScheduling, "codegen_comment", triton, triton_comment),
        (ir.ExternKernel, "codegen_comment", extern, extern_comment),
    )
    for owner, name, _, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for owner, name, theirs, _ in replaced:
            setattr(owner, name, theirs)


def _write_sites(wrapper: Any, parts: list[list[Any]]) -> None:
    """The comments before the call of a kernel, of whose parts each computes some of Inductor's nodes."""
    noted = vars(wrapper).setdefault("deepfuse_noted", set())
    nodes = [computed for part in parts for computed in part if computed is not None]
    for node in (origin for n in nodes for origin in (*n.origins, n.get_origin_node())):
        if node is not None and SITE in node.meta and node.meta[SITE] not in noted:
            noted.add(node.meta[SITE])
            wrapper.writeline(f"{NOTED} {node.meta[SITE_TEXT]}")
    wrapper.writeline(f"{KERNEL} {'|'.join(map(_part_sites, parts))}")


def _part_sites(computed: list[Any]) -> str:
    """Sites of Inductor's nodes: those whose results they are, and the others they have taken in."""
    from torch._inductor import ir

    own: set[int] = set()
    origins: set[int] = set()
    for node in filter(None, computed):
        known = [n for n in node.origins if SITE in n.meta]
        exact = node.get_origin_node()
        # a wait claims the tensor it waits for: what started the collective, and a loop that wrote it in place
        if isinstance(node, ir._CollectiveKernel):
            name = getattr(node.op_overload, "_opname", "").rstrip("_")  # in place it ends in _
            known = [n for n in known if getattr(n.target, "_opname", "") == name] or known
            exact = max(known, key=lambda n: n.meta[SITE], default=None)
        elif exact is not None and getattr(exact.target, "namespace", "") == COLLECTIVES:
            known = [n for n in known if getattr(n.target, "namespace", "") != COLLECTIVES] or known
            exact = None
        numbers = {n.meta[SITE] for n in known}
        # a result that is no node's own is that of the last node in it
        own |= {exact.meta[SITE]} if exact is not None and SITE in exact.meta else set(sorted(numbers)[-1:])
        if isinstance(node, ir.ComputedBuffer):  # others are calls, which take nothing in
            origins |= numbers
    return "/".join("+".join(map(str, sorted(numbers))) for numbers in (own, origins - own))


def load_code(source: str) -> types.ModuleType:
    """A module from Inductor's Python, its kernels compiled, where they are not yet."""
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    with config.patch(CPP_FLAGS):
        return PyCodeCache.load(source)


def load_captured(data: bytes) -> Callable[..., Any]:
    """The function that :func:`capture` compiled, in another process.

    Raises:
        Exception: of any kind, where the bytes are damaged or come from another torch.
    """
    from torch._dynamo.aot_compile import AOTCompiledFunction
    from torch._inductor import config

    # compiled C++ is found by its source and its flags; with other flags it would be compiled again
    with config.patch(CPP_FLAGS):
        compiled = AOTCompiledFunction.deserialize(data)
    compiled.disable_guard_check()
    return compiled


def process_group(name: str) -> Any:
    """The process group of that name, as graphs have it."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def set_group_timeout(group: Any, timeout: datetime.timedelta) -> None:
    """How long collectives of a process group wait from now on: public from torch 2.15 on."""
    distributed = torch.distributed
    public = getattr(distributed, "set_timeout", None)
    (public or distributed.distributed_c10d._set_pg_timeout)(timeout, group)


def default_store() -> Any:
    """The store over which the processes of torch.distributed met."""
    return torch.distributed.distributed_c10d._get_default_store()


def cuda_memory_snapshot(call: Callable[[], object]) -> dict[str, Any]:
    """What the allocator of CUDA memory did in ``call``, and has at its end, as PyTorch's memory_viz reads it pickled."""
    memory: Any = torch.cuda.memory
    memory._record_memory_history()
    try:
        call()
        return memory._snapshot()
    finally:
        memory._record_memory_history(enabled=None)
