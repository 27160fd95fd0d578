"""Inlined PTX and MLIR of kernels, emulated for a warpgroup, against what interpret mode computes instead.

Interpret mode replaces inlined code by its `interpret_impl`, so it says nothing of registers, shuffled channels and
swizzled addresses. Here the code's MLIR is built and evaluated operation by operation.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import builtin, func, llvm

THREADS = np.arange(128)
LANE, WARP = THREADS % 32, THREADS // 32
GROUP, MEMBER = LANE // 4, LANE % 4
E4M3, F16, BF16 = jnp.dtype("float8_e4m3fn"), np.dtype("float16"), jnp.dtype("bfloat16")


class Emulator:
    """Values are arrays over threads, vectors with a second axis; 16-bit floats in vectors keep their dtype."""

    def __init__(self):
        self.memory = np.zeros(1 << 22, np.uint8)
        self.used, self.values, self.bases = 1024, {}, {}

    def place(self, data: np.ndarray) -> int:
        raw, base = np.ascontiguousarray(data).view(np.uint8).reshape(-1), self.used
        self.memory[base : base + raw.size] = raw
        self.used += -(-raw.size // 1024) * 1024 + (1 << 18)  # merging writes past a tile
        return base

    def read(self, address, count: int, dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        where = address.astype(np.int64)[:, None] + np.arange(count * dtype.itemsize)
        assert (where >= 1024).all() and (where < self.used).all(), "outside of its memory"
        return self.memory[where].view(dtype)

    def write(self, address, value: np.ndarray, mask=None) -> None:
        raw = np.ascontiguousarray(value[:, None]).view(np.uint8).reshape(len(THREADS), -1)
        where = address.astype(np.int64)[:, None] + np.arange(raw.shape[1])
        if mask is not None:
            where, raw = where[mask], raw[mask]
        self.memory[where] = raw

    def run(self, block) -> None:
        for op in block.operations:
            operands = [self.values[v] for v in op.operands]
            results = self.evaluate(op.operation, operands)
            for value, result in zip(op.results, results, strict=True):
                self.values[value] = result

    def evaluate(self, op, x) -> list:
        name, attributes = op.name.removeprefix("arith.").removeprefix("vector."), op.attributes
        kind = str(op.results[0].type) if len(op.results) else ""
        unsigned = [v.view(np.uint32) for v in x if getattr(v, "dtype", None) == np.int32]
        integer = np.int64 if kind == "i64" else np.int32
        match name:
            case "constant" | "llvm.mlir.constant":
                dtype = np.float32 if kind == "f32" else integer
                return [np.full(128, attributes["value"].value, dtype)]
            case "addi" | "addf":
                return [x[0] + x[1]]
            case "muli" | "mulf":
                return [x[0] * x[1]]
            case "subf":
                return [x[0] - x[1]]
            case "divf":
                return [x[0] / x[1]]
            case "maximumf":
                return [np.maximum(x[0], x[1])]
            case "divui":
                return [(unsigned[0] // unsigned[1]).view(np.int32)]
            case "remui":
                return [(unsigned[0] % unsigned[1]).view(np.int32)]
            case "shli":
                return [(unsigned[0] << unsigned[1]).view(np.int32)]
            case "shrui":
                return [(unsigned[0] >> unsigned[1]).view(np.int32)]
            case "andi":
                return [x[0] & x[1]]
            case "ori":
                return [x[0] | x[1]]
            case "xori":
                return [x[0] ^ x[1]]
            case "minsi":
                return [np.minimum(x[0], x[1])]
            case "maxsi":
                return [np.maximum(x[0], x[1])]
            case "cmpi":
                kinds = {1: np.not_equal, 2: np.less, 5: np.greater_equal}
                return [kinds[attributes["predicate"].value](*x)]
            case "math.absf":
                return [np.abs(x[0])]
            case "math.fma":
                return [x[0] * x[1] + x[2]]
            case "nvvm.shfl.sync":
                return [x[1][THREADS ^ x[2]]]
            case "select":
                return [np.where(*x)]
            case "extui":
                return [unsigned[0].astype(np.int64)]
            case "extsi":
                return [x[0].astype(np.int64)]
            case "extract":
                return [x[0][:, attributes["static_position"][0]]]
            case "extract_strided_slice":
                first, size = (attributes[key][0].value for key in ("offsets", "sizes"))
                return [x[0][:, first : first + size]]
            case "shuffle":
                return [np.concatenate(x, axis=1)[:, list(attributes["mask"])]]
            case "from_elements":
                return [np.stack(x, axis=1)]
            case "broadcast":
                count = ir.VectorType(op.results[0].type).shape[0]
                return [np.stack([x[0]] * count, axis=1)]
            case "bitcast" if "vector" in kind:
                element = dtype_of(ir.VectorType(op.results[0].type).element_type)
                return [np.ascontiguousarray(x[0]).reshape(128, -1).view(element)]
            case "bitcast" if kind == "f32":
                return [np.ascontiguousarray(x[0]).view(np.float32).reshape(128)]
            case "bitcast" if kind == "i16":
                return [np.ascontiguousarray(x[0]).view(np.int16).reshape(128)]
            case "bitcast":
                return [np.ascontiguousarray(x[0]).view(np.int32).reshape(128)]
            case "builtin.unrealized_conversion_cast":
                return [np.full(128, self.bases[op.operands[0]], np.int64)]
            case "llvm.ptrtoint" | "llvm.inttoptr":
                return [x[0].astype(integer if kind != "!llvm.ptr" else np.int64)]
            case "llvm.extractvalue":
                return [x[0][attributes["position"][0]]]
            case "llvm.getelementptr":
                size = np.dtype(dtype_of(attributes["elem_type"].value)).itemsize
                static = attributes["rawConstantIndices"][0]
                return [x[0] + size * (x[1] if len(x) == 2 else static)]
            case "llvm.load":
                if "vector" in kind:
                    vector = ir.VectorType(op.results[0].type)
                    return [self.read(x[0], vector.shape[0], dtype_of(vector.element_type))]
                return [self.read(x[0], 1, dtype_of(op.results[0].type))[:, 0]]
            case "llvm.store":
                return self.write(x[1], x[0]) or []
            case "llvm.inline_asm":
                found = self.assembly(attributes["asm_string"].value, x)
                return [] if not len(op.results) else [found]
        raise NotImplementedError(str(op))

    def statements(self, text: str, x) -> list:
        """A block of bitwise and 16-bit floating instructions on registers t and u; outputs come first."""
        lines = [line.removesuffix(";") for line in text.split("\n")[1:-1]]
        lines = [line for line in lines if not line.startswith(".reg")]
        targets = {line.split()[1].removesuffix(",") for line in lines}
        outputs = {name for name in targets if name.startswith("$")}
        registers = {f"${len(outputs) + i}": v.view(np.uint32) for i, v in enumerate(x)}

        def value(name: str) -> np.ndarray:
            return registers[name] if name in registers else np.full(128, int(name, 0), np.uint32)

        for line in lines:
            opcode, _, names = line.partition(" ")
            target, *names = names.split(", ")
            a, *others = (value(name) for name in names)
            match opcode.split("."):
                case ["mov", _]:
                    found = a
                case ["shl", _]:
                    found = a << others[0]
                case ["shr", _]:
                    found = a >> others[0]
                case ["and", _]:
                    found = a & others[0]
                case ["xor", _]:
                    found = a ^ others[0]
                case ["add", "u32"]:
                    found = a + others[0]
                case ["sub", "u32"]:
                    found = a - others[0]
                case ["vabsdiff4", *_]:
                    pairs = [
                        np.ascontiguousarray(v)[:, None].view(np.uint8) for v in (a, others[0])
                    ]
                    found = np.abs(np.subtract(*pairs, dtype=np.int16)).astype(np.uint8)
                    found = np.ascontiguousarray(found).view(np.uint32)[:, 0]
                case ["lop3", _]:
                    b, c, table = others
                    terms = [
                        np.where(
                            table >> i & 1, *np.broadcast_arrays(minterm(i, a, b, c), np.uint32(0))
                        )
                        for i in range(8)
                    ]
                    found = np.bitwise_or.reduce(terms)
                case ["fma", *_, "bf16x2"]:
                    factors = [np.ascontiguousarray(v)[:, None].view(BF16) for v in (a, *others)]
                    exact = [v.astype(np.float64) for v in factors]
                    exact = exact[0] * exact[1] + exact[2]
                    found = exact.astype(BF16).view(np.uint32)[:, 0]
                case ["sub" | "mul" as operation, *_, pair]:
                    dtype = BF16 if pair == "bf16x2" else F16
                    a, b = (np.ascontiguousarray(v)[:, None].view(dtype) for v in (a, others[0]))
                    exact = [v.astype(np.float64) for v in (a, b)]
                    exact = exact[0] - exact[1] if operation == "sub" else exact[0] * exact[1]
                    found = exact.astype(dtype).view(np.uint32)[:, 0]
                case _:
                    raise NotImplementedError(line)
            registers[target] = found.astype(np.uint32)
        return [registers[f"${i}"].view(np.int32) for i in range(len(outputs))]

    def assembly(self, text: str, x) -> object:
        mask = None
        if text.startswith("@"):
            text, mask, x = text.split(" ", 1)[1], np.asarray(x[-1], bool), x[:-1]
        if text.startswith("cp.async.cg"):
            target, source, size = x
            read = np.where(size == 16, source, 1024)  # what is not read may lie anywhere
            value = np.where((size == 16)[:, None], self.read(read, 4, np.int32), 0)
            return self.write(target, value.astype(np.int32), mask)
        if text.startswith("st.global"):
            return self.write(x[0], x[1], mask)
        if text.startswith("{\n.reg .b32 t"):
            return self.statements(text, x)
        if text.startswith("ldmatrix"):
            rows = self.read(x[0], 8, np.uint16).reshape(4, 4, 8, 8)  # warp, matrix, row, column
            if ".trans" in text:
                rows = rows.swapaxes(2, 3)
            pairs = np.ascontiguousarray(rows).view(np.int32)  # warp, matrix, 8, 4
            return [pairs[WARP, m, GROUP, MEMBER] for m in range(4)]
        if text.startswith("movmatrix"):
            rows = np.zeros((4, 8, 8), np.uint16)  # warp, row, column
            for j in range(2):
                halves = np.ascontiguousarray(x[0])[:, None].view(np.uint16)
                rows[WARP, GROUP, 2 * MEMBER + j] = halves[:, j]
            rows = np.ascontiguousarray(rows.swapaxes(1, 2)).view(np.int32)
            return rows[WARP, GROUP, MEMBER]
        if text.startswith("mma"):
            return self.mma(BF16 if ".bf16." in text else F16, x)
        if text.startswith("cvt.rn.f16x2.f32"):
            return np.stack([x[0]] * 2, axis=1).astype(F16).view(np.int32)[:, 0]
        if "cvt.rn.f16x2" in text:
            dtype = E4M3 if "e4m3x2" in text else jnp.dtype("float8_e5m2")
            wide = np.ascontiguousarray(x[0])[:, None].view(dtype).astype(F16).view(np.int32)
            return [wide[:, 0], wide[:, 1]] if "$1, high" in text else wide[:, 0]
        if text.startswith("prmt"):
            data = np.stack([x[0], x[0] if len(x) == 1 else x[1]], axis=1).view(np.uint8)
            selector = x[2] if len(x) == 3 else np.full(128, int(text.split()[-1].strip(";"), 16))
            chosen = [data[THREADS, selector >> (4 * i) & 7] for i in range(4)]
            return np.stack(chosen, axis=1).view(np.int32)[:, 0]
        if text.startswith("mul.rn.f16x2"):
            a, b = (np.ascontiguousarray(v)[:, None].view(F16) for v in x)
            return (a * b).view(np.int32)[:, 0]
        if text.startswith("ex2"):
            return np.exp2(x[0])
        if text.startswith("st.shared"):
            if ".v" in text:
                steps = [4 * i for i in range(len(x) - 1)]
            else:
                steps = [0, int(text.split("[$0+")[1].split("]")[0])]
            for step, value in zip(steps, x[1:], strict=True):
                self.write(x[0] + step, value)
            return None
        if text.startswith("ld.shared"):
            count = int(text[11]) if text[10] == "v" else 1
            dtype = np.float32 if "f32" in text else np.int32
            offset = int(text.split("+")[1].split("]")[0])
            found = list(self.read(x[0] + offset, count, dtype).T)
            return found if count > 1 else found[0]
        raise NotImplementedError(text)

    def mma(self, dtype, x) -> list:
        """m16n8k16 as the PTX manual assigns its fragments to threads."""
        halves = [np.ascontiguousarray(v)[:, None].view(dtype).astype(np.float32) for v in x[:6]]
        a, b = np.zeros((4, 16, 16), np.float32), np.zeros((4, 16, 8), np.float32)
        for j in range(2):
            for i, value in enumerate(halves[:4]):
                a[WARP, GROUP + 8 * (i % 2), 2 * MEMBER + j + 8 * (i // 2)] = value[:, j]
            for i, value in enumerate(halves[4:]):
                b[WARP, 2 * MEMBER + j + 8 * i, GROUP] = value[:, j]
        d = a @ b
        return [x[6 + i] + d[WARP, GROUP + 8 * (i // 2), 2 * MEMBER + i % 2] for i in range(4)]


def minterm(i: int, a, b, c) -> np.ndarray:
    """The bits where a, b and c are those of i, as lop3's table counts them."""
    return (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)


def dtype_of(element: ir.Type) -> np.dtype:
    names = {"f8E4M3FN": E4M3, "bf16": BF16, "f16": F16, "f32": np.float32, "i32": np.int32}
    names["i8"] = np.int8
    return np.dtype(names[str(element)])


def element_of(dtype) -> ir.Type:
    names = {"float32": ir.F32Type, "bfloat16": ir.BF16Type, "float16": ir.F16Type}
    name = np.dtype(dtype).name
    return names[name].get() if name in names else ir.IntegerType.get_signless(32)


def places(layout, shape) -> list[tuple[np.ndarray, ...]]:
    """Row and column of each thread's numbers, register by register."""
    if isinstance(layout, fa.WGStridedFragLayout) and len(shape) == 1:
        assert shape == (128,) and layout.vec_size == 1
        return [(THREADS[:, None],)]
    if isinstance(layout, fa.WGStridedFragLayout):
        count = math.prod(shape) // (128 * layout.vec_size)
        flat = [
            ((i * 128 + THREADS)[:, None] * layout.vec_size) + np.arange(layout.vec_size)
            for i in range(count)
        ]
        return [np.unravel_index(f, shape) for f in flat]
    rows = [(16 * WARP + GROUP + 8 * half)[:, None] for half in range(2)]
    if layout == fa.WGMMA_COL_LAYOUT:
        columns = (2 * MEMBER)[:, None] + np.arange(2)
        return [(8 * tile + columns,) for tile in range(shape[0] // 8)]
    if len(shape) == 1:
        return [(row,) for row in rows]
    if layout == fa.WGMMA_LAYOUT_8BIT:
        columns = (4 * MEMBER)[:, None] + np.arange(4)
        return [
            (row + 0 * columns, 16 * tile + columns)
            for tile in range(shape[1] // 16)
            for row in rows
        ]
    columns = (2 * MEMBER)[:, None] + np.arange(2)
    return [
        (row + 0 * columns, 8 * tile + columns) for tile in range(shape[1] // 8) for row in rows
    ]


class Emulated:
    """Replaces `plgpu.inline_mgpu`: runs the instructions, compares with the reference and returns that."""

    def __init__(self, images=None):
        self.images = images or {}  # bytes in memory, by the id of an argument
        self.layouts = {}  # of arguments that are written: what makes their bytes

    def __call__(self, *, arg_types, return_type=None):
        types = jax.tree.leaves(return_type)
        single = isinstance(return_type, plgpu.ShapeDtypeStruct)

        def run(fn):
            def compared(*args):
                found = self.compare(fn, arg_types, types, args)
                return found[0] if single else found

            return compared

        return run

    def compare(self, fn, kinds, result_types, args):
        emulator = Emulator()
        with mlir.make_ir_context() as context, ir.Location.unknown(context):
            module = ir.Module.create()
            types, feeds, specs = [thread_type()], [THREADS.astype(np.int32)], []
            for kind, arg in zip(kinds, args, strict=True):
                specs.append((kind, arg, len(types)))
                if isinstance(kind, plgpu.RefType):
                    element = element_of(arg.dtype)
                    types.append(ir.MemRefType.get(arg.shape, element))
                    feeds.append(emulator.place(self.images.get(id(arg), np.asarray(arg))))
                elif not np.ndim(arg):
                    types.append(ir.IntegerType.get_signless(32))
                    feeds.append(np.full(128, arg, np.int32))
                else:
                    for place in places(kind.to_mgpu(), arg.shape):
                        types.append(ir.VectorType.get((place[0].shape[1],), element_of(arg.dtype)))
                        feeds.append(np.asarray(arg)[place])
            with ir.InsertionPoint(module.body):
                function = func.FuncOp("emulated", (types, []))
            block = function.add_entry_block()
            with ir.InsertionPoint(block):
                found = self.emit(fn, specs, list(block.arguments))
            for value, feed in zip(block.arguments, feeds, strict=True):
                emulator.values[value] = emulator.bases[value] = feed
            emulator.run(block)
            found = found if isinstance(found, tuple) else () if found is None else (found,)
            outs = [self.gather(emulator, *pair) for pair in zip(found, result_types, strict=True)]
        expected = jax.tree.leaves(fn.interpret_impl(*(jnp.asarray(a) for a in args)))
        for i, written in zip(
            getattr(fn, "interpret_writes", ()), expected[len(outs) :], strict=True
        ):
            raw = self.layouts[id(args[i])](np.asarray(written)).reshape(-1)
            start = feeds[specs[i][2]]
            stored = emulator.memory[start : start + raw.size].view(written.dtype)
            close(stored, raw.view(written.dtype), 2e-3)  # three roundings to 11 bits
        for out, wanted in zip(outs, expected[: len(outs)], strict=True):
            close(out, np.asarray(wanted), 1e-5)
        return tuple(expected[: len(outs)])

    @staticmethod
    def gather(emulator, found, result_type) -> np.ndarray:
        out = np.zeros(result_type.shape, result_type.dtype)
        layout = result_type.layout.to_mgpu()
        assert found.layout == layout
        for register, place in zip(found.registers.flat, places(layout, out.shape), strict=True):
            out[place] = emulator.values[register].reshape(place[0].shape)
        return out

    @staticmethod
    def emit(fn, specs, arguments):
        inputs = []
        for kind, arg, first in specs:
            if isinstance(kind, plgpu.RefType):
                inputs.append(arguments[first])
            elif not np.ndim(arg):
                inputs.append(fa.FragmentedArray.splat(arguments[first], (), is_signed=True))
            else:
                layout = kind.to_mgpu()
                count = len(places(layout, arg.shape))
                registers = np.array(arguments[first : first + count], dtype=object)
                registers = registers.reshape(layout.registers_shape(arg.shape))
                signed = True if np.asarray(arg).dtype == np.int32 else None
                inputs.append(
                    fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)
                )
        old = utils.thread_idx, utils.memref_ptr, utils.warpgroup_barrier
        utils.thread_idx = lambda: arguments[0]
        utils.memref_ptr = lambda ref: builtin.unrealized_conversion_cast(
            [llvm.PointerType.get()], [ref]
        )
        utils.warpgroup_barrier = lambda: None  # all threads run in step
        try:
            return fn(None, *inputs)
        finally:
            utils.thread_idx, utils.memref_ptr, utils.warpgroup_barrier = old


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=min(tolerance, 1e-5) * scale)


def thread_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def swizzled(tile: np.ndarray, swizzle: int) -> np.ndarray:
    """A tile's bytes in shared memory: tiles of 8 rows and `swizzle` bytes, swizzled; 16 is as it is."""
    raw = np.ascontiguousarray(tile).view(np.uint8).reshape(tile.shape[0], -1)
    if swizzle == 16:
        return raw
    raw = raw.reshape(-1, 8, raw.shape[1] // swizzle, swizzle).swapaxes(1, 2).reshape(-1)
    at = np.arange(raw.size)
    out = np.zeros_like(raw)
    out[at ^ (at >> 3 & (swizzle - 16))] = raw  # PTX manual, swizzling modes
    return out
