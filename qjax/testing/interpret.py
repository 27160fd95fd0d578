"""Mosaic GPU's interpret mode on the CPU, completed by what mixed-input kernels need.

JAX 0.11.2's interpreter refuses three things that run on the GPU: ``wgmma`` with its left operand in registers,
TMA that adds to device memory, and ``inline_mgpu`` that returns a value. While `interpret` is active, the first
two are computed with numpy, and the third calls the function's ``interpret_impl`` attribute, a jax.numpy reference
of the inlined PTX that gets the values of the arguments, those of references included. If the PTX writes to
references, the function's ``interpret_writes`` has their indices, and the reference returns their new values
after its other results. ``interpret_async`` makes such writes asynchronous copies, see
`qjax.testing._interpret_copies`.

The interpreter executes wgmma at once, so a missing ``wgmma_wait`` is not caught here, and it checks no register
layouts; `qjax.testing.lower_for_gpu` and `ptxas_reports` check those.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax._src import callback, state
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    get_races,
    reset_gpu_interpret_mode_state,
)
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.testing import _interpret_copies

_Interpreter = jaxpr_interpret.JaxprInterpreter
_interpret_wgmma = _Interpreter._interpret_wgmma_ref_p
_interpret_inline = _Interpreter._interpret_inline_mgpu_p
_copy_smem_to_gmem = gpu_callbacks.copy_smem_to_gmem


@contextlib.contextmanager
def interpret(*, detect_races: bool = True) -> Iterator[None]:
    """Runs the Mosaic GPU kernels that are traced in its body on the CPU.

    Reads out of bounds raise, memory that nothing wrote reads as NaN, and a barrier that completes more often
    than it is waited for raises.

    Args:
        detect_races: Also report unsynchronized accesses to one buffer, including generic-proxy reads that
            a later TMA write does not wait for.

    Raises:
        AssertionError: If the body ran and the race detector found something, or a kernel ended before its
            asynchronous copies.
    """
    _Interpreter._interpret_wgmma_ref_p = _interpret_wgmma_or_register
    _Interpreter._interpret_inline_mgpu_p = _interpret_inline_reference
    gpu_callbacks.copy_smem_to_gmem = _copy_or_add_smem_to_gmem
    try:
        with plgpu.force_gpu_interpret_mode(
            plgpu.InterpretGPUParams(detect_races=detect_races, out_of_bounds_reads="raise")
        ):
            yield
            jax.effects_barrier()
        races = detect_races and get_races()
        if races and races.races_found:
            raise AssertionError("the kernel has data races; the interpreter printed each of them")
        if count := _interpret_copies.forget_copies():
            raise AssertionError(
                f"the kernel ended with {count} asynchronous copies not waited for"
            )
    finally:
        _interpret_copies.forget_copies()
        _Interpreter._interpret_wgmma_ref_p = _interpret_wgmma
        _Interpreter._interpret_inline_mgpu_p = _interpret_inline
        gpu_callbacks.copy_smem_to_gmem = _copy_smem_to_gmem
        # After an exception the interpreter's shared state would break every later kernel.
        reset_gpu_interpret_mode_state()


def _interpret_wgmma_or_register(self, eqn, token, get_invals):
    accumulator_var, lhs_var, rhs_var = eqn.invars[:3]
    if isinstance(lhs_var.aval, state_types.AbstractRef):
        return _interpret_wgmma(self, eqn, token, get_invals)
    accumulator, lhs, rhs, *leaves = get_invals()
    trees = tuple(
        eqn.params[name] or jax.tree.structure([])
        for name in ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
    )
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    accumulator, accumulator_transforms = jaxpr_interpret.resolve_ref(
        accumulator_var.aval, accumulator, transforms[0]
    )
    rhs, rhs_transforms = jaxpr_interpret.resolve_ref(rhs_var.aval, rhs, transforms[2])
    token = callback.io_callback(
        functools.partial(_multiply_register, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        accumulator_key=accumulator,
        accumulator_transforms=accumulator_transforms,
        lhs=lhs,
        rhs_key=rhs,
        rhs_transforms=rhs_transforms,
    )
    return token, []


@gpu_callbacks.fail_on_exception
def _multiply_register(
    *,
    token,
    mesh_location,
    thread,
    accumulator_key,
    accumulator_transforms,
    lhs,
    rhs_key,
    rhs_transforms,
    source_info,
):
    """accumulator += lhs @ rhs, with the interpreter's own bookkeeping of accesses."""

    def locate(key, transforms):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        return key, memory.access(key, transforms)

    memory = gpu_callbacks._get_shared_memory()
    info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    rhs, *_ = memory.get_buffer_content(*locate(rhs_key, rhs_transforms), thread, logging_info=info)
    target = locate(accumulator_key, accumulator_transforms)
    total, *_ = memory.get_buffer_content(*target, thread, logging_info=info)
    assert rhs is not None and total is not None, "an operand of wgmma lies outside its memory"
    total = total + np.matmul(np.asarray(lhs), rhs, dtype=total.dtype)
    memory.store_buffer_content(*target, total, thread, logging_info=info)
    return token


class _Addition(gpu_callbacks.AsyncCopySmemToGmemTask):
    """A TMA store that adds to what is there."""

    def __call__(self, tma_thread_id: int):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        source = (self.src_allocation_key, self.src_access)
        info = self.logging_info
        values, *_ = memory.get_buffer_content(*source, self.thread, logging_info=info)
        assert values is not None, "a TMA store reads outside of shared memory"
        self.post_read(tma_thread_id, memory)
        extent = tuple(memory.buffer_shape_and_dtype(self.dst_allocation_key).shape)
        inside = gpu_callbacks._clip_store_to_shape(self.dst_access, values, extent)
        if inside is not None:
            target, values = (self.dst_allocation_key, inside[0]), inside[1]
            before, *_ = memory.get_buffer_content(*target, self.thread, logging_info=info)
            memory.store_buffer_content(*target, before + values, self.thread, logging_info=info)
        self.post_write(tma_thread_id, memory)


@gpu_callbacks.fail_on_exception
def _copy_or_add_smem_to_gmem(*, token, thread, **arguments):
    if arguments["reduction_op"] is None:
        return _copy_smem_to_gmem(token=token, thread=thread, **arguments)
    assert arguments["reduction_op"] == "add" and arguments["predicate"] is None
    memory = gpu_callbacks._get_shared_memory()
    places = {}
    for name in ("src", "dst"):
        key = gpu_callbacks.HostAllocationKey.from_array(
            arguments[f"{name}_allocation_key_as_array"]
        )
        transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{name}_transforms"])
        places[f"{name}_allocation_key"] = key
        places[f"{name}_access"] = memory.access(key, jax.tree.map(int, transforms))
    task = _Addition(
        mesh_location=arguments["mesh_location"],
        thread=thread,
        source_info=arguments["source_info"],
        clock=memory.incr_clock(thread) if memory.detect_races else None,
        **places,
    )
    memory.execute_async_task(task)
    return token


def _interpret_inline_reference(self, eqn, token, get_invals):
    reference = getattr(eqn.params["mgpu_fn"], "interpret_impl", None)
    if reference is None:
        return _interpret_inline(self, eqn, token, get_invals)
    tree = eqn.params["pytree_args"]
    values = get_invals()
    leaves, transform_leaves = values[: tree.num_leaves], values[tree.num_leaves :]
    transforms = jax.tree.unflatten(eqn.params["pytree_ref_transforms"], transform_leaves)
    arguments, references = [], []
    for var, leaf, ref_transforms in zip(eqn.invars, leaves, transforms, strict=False):
        place = None
        if isinstance(var.aval, state_types.AbstractRef):
            named = state.transform_type(ref_transforms, var.aval)
            ref, ref_transforms = jaxpr_interpret.resolve_ref(var.aval, leaf, ref_transforms)
            assert isinstance(named, state_types.AbstractRef)
            place = {
                "mesh_location": self.mesh_location,
                "thread": self.thread,
                "result_shape_and_dtype": named.inner_aval,
                "allocation_key_as_array": ref,
                "transforms": ref_transforms,
                "source_info": eqn.source_info,
            }
            token, leaf = gpu_callbacks.call_get(token=token, **place)
        arguments.append(leaf)
        references.append(place)
    results = jax.tree.leaves(reference(*jax.tree.unflatten(tree, arguments)))
    writes = getattr(eqn.params["mgpu_fn"], "interpret_writes", ())
    asynchronous = getattr(eqn.params["mgpu_fn"], "interpret_async", None)
    if asynchronous is not None and asynchronous != "copy":
        token = _interpret_copies.commit_or_wait(
            token, asynchronous, self.mesh_location, self.thread
        )
    for i, value in zip(writes, results[len(results) - len(writes) :], strict=True):
        if asynchronous == "copy":
            token = _interpret_copies.copy(token, value, references[i])
            continue
        token, _ = gpu_callbacks.call_swap(token=token, val=value, mask=None, **references[i])
    return token, results[: len(results) - len(writes)]
