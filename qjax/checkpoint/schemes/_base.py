"""What every checkpoint format provides: which modules are quantized how, and how their tensors decode."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qjax.formats import QFormat
from qjax.recipe import KVCacheFormat, QuantSpec, Recipe, Rule


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file's header describes it: safetensors' dtype word, and the shape."""

    dtype: str
    shape: tuple[int, ...]


Tensors = Mapping[str, np.ndarray]
Infos = Mapping[str, TensorInfo]
Parts = dict[str, np.ndarray]
"""`QArray`'s parts by name, host arrays, and perhaps "activation_scale"."""

SCALE_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
}
WIDE = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")
"""Dtype words of scales: floats, and bare exponents, which older exporters write as bytes."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one quantized weight lies in a checkpoint.

    Attributes:
        name: For messages.
        required: Tensor names after the module's.
        optional: Names that may be there and are read.
        accepted: Names that may be there and say nothing that is not known otherwise.
        scale: Which of the tensors holds the scales, whose dtype becomes the format's.
        decode: (tensors, format, logical shape [..., N, K]) -> canonical parts.
        dtypes: {tensor name: dtype words it may have}; other names may have any.
        aliases: {tensor name: another name for it, of other exporters}.
        joiner: Between the module's name and a tensor's: "." or, in GPT-OSS, "_".
    """

    name: str
    required: tuple[str, ...]
    scale: str
    decode: Callable[[Tensors, QFormat, tuple[int, ...]], Parts]
    optional: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    joiner: str = "."

    def tensor_names(self, path: str, available: Mapping[str, Any]) -> dict[str, str]:
        """{tensor name after the module's: full name} of the tensors of one module that are read.

        Raises:
            ValueError: If a required one is missing.
        """
        full = {s: f"{path}{self.joiner}{s}" for s in (*self.required, *self.optional)}
        for suffix, alias in self.aliases.items():
            other = f"{path}{self.joiner}{alias}"
            if full[suffix] not in available and other in available:
                full[suffix] = other
        missing = [full[s] for s in self.required if full[s] not in available]
        if missing:
            raise ValueError(f"{path}: {self.name} needs {missing}, which the checkpoint lacks")
        return {s: name for s, name in full.items() if name in available}

    def complete(self, format: QFormat, infos: Infos, path: str) -> QFormat:
        """The format with the scale dtype that the checkpoint holds.

        Raises:
            ValueError: If a tensor has a dtype that it can't have in this layout.
        """
        for suffix, allowed in self.dtypes.items():
            if suffix in infos and infos[suffix].dtype not in allowed:
                raise ValueError(
                    f"{path}{self.joiner}{suffix}: {self.name} has it in {' or '.join(allowed)}; "
                    f"found {infos[suffix].dtype}"
                )
        dtype = infos[self.scale].dtype
        if dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{path}: {self.scale} is {dtype}; scales must be one of {sorted(SCALE_DTYPES)}"
            )
        if format.scale_rule == "mx" or format.global_scale:
            return format
        return dataclasses.replace(format, scale_dtype=SCALE_DTYPES[dtype])


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules of one scheme.

    Attributes:
        targets: As in `Rule`.
        spec: The quantization, scale dtype still to be completed; None leaves the modules plain.
        codec: How their weights are stored; None for plain ones.
    """

    targets: tuple[str, ...]
    spec: QuantSpec | None
    codec: Codec | None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a config.json's quantization says.

    Attributes:
        method: quant_method.
        groups: The first one that names a module holds for it.
        ignore: Targets that are plain.
        kv_cache: Storage of the KV cache, None if it says nothing.
    """

    method: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    kv_cache: KVCacheFormat | None = None

    def resolve(self, kinds: Mapping[str, str]) -> dict[str, Group]:
        """{path: group} of the quantized modules among `kinds` ({path: class word}).

        A module's own name goes before patterns, and those before its class word, whatever the order of
        the groups.

        Raises:
            ValueError: If a group matches no module.
        """
        found: dict[str, Group] = {}
        hit: set[int] = set()
        ignored, grouped = _Targets([self.ignore]), _Targets([g.targets for g in self.groups])
        for path, kind in kinds.items():
            if ignored.find(path, kind) is not None:
                continue
            i = grouped.find(path, kind)
            if i is not None:
                hit.add(i)
                if self.groups[i].spec is not None:
                    found[path] = self.groups[i]
        unused = [g.targets for i, g in enumerate(self.groups) if i not in hit and g.spec]
        if unused:
            raise ValueError(
                f"config.json: quantization ({self.method}): {unused} match no module of this model; "
                f"its modules are named like {list(kinds)[:3]}"
            )
        return found

    @property
    def recipe(self) -> Recipe:
        """The same as a recipe, scale dtypes not completed."""
        rules = tuple(Rule(g.targets, g.spec) for g in self.groups if g.spec is not None)
        every = {t for rule in rules for t in rule.targets} | set(self.ignore)
        return Recipe(rules, self.ignore, self.kv_cache, frozenset(every))


class _Targets:
    """Lists of targets made ready for thousands of modules: names in a table, patterns compiled once."""

    def __init__(self, lists: Sequence[Iterable[str]]):
        self._names: dict[str, int] = {}
        self._patterns: list[tuple[re.Pattern[str], int]] = []
        for i, targets in enumerate(lists):
            parts = []
            for target in targets:
                if target.startswith(_PART) and target.endswith(_REST):
                    parts.append(target[len(_PART) : -len(_REST)])
                elif target.startswith("re:"):
                    self._patterns.append((re.compile(target[3:]), i))
                else:
                    self._names.setdefault(target, i)
            if parts:  # one alternation: exporters list hundreds of modules
                pattern = f"{_PART[3:]}(?:{'|'.join(parts)}){_REST}"
                self._patterns.append((re.compile(pattern), i))

    def find(self, path: str, kind: str) -> int | None:
        """Which list names this module, None if none does."""
        if path in self._names:
            return self._names[path]
        for pattern, i in self._patterns:
            if pattern.fullmatch(path):
                return i
        return self._names.get(kind)


class Settings:
    """Fields of a quantization config, taken one by one; what is left over is an error."""

    def __init__(self, config: Mapping[str, Any], where: str, harmless: frozenset[str]):
        """Takes the mapping, its name in messages, and fields that change nothing."""
        if not isinstance(config, Mapping):
            raise ValueError(f"{where} must be an object; found {config!r}")
        self._config, self._where, self._harmless = config, where, harmless
        self._taken: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it stands; null counts as missing."""
        self._taken.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def choice(self, name: str, allowed: tuple, default: Any = None) -> Any:
        """A field with one of these values.

        Raises:
            ValueError: If it has another.
        """
        value = self.get(name, default)
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise ValueError(
                f"{self._where}: {name} = {value!r} is not supported; supported: {list(allowed)}"
            )
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, empty where it is missing.

        Raises:
            ValueError: If it is something else.
        """
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{self._where}: {name} must be a list of strings; found {value!r}")
        return tuple(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object, empty where it is missing.

        Raises:
            ValueError: If it is something else.
        """
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{self._where}: {name} must be an object; found {value!r}")
        return value

    def group_size(self, name: str, default: int | None = None) -> int:
        """A group size: a positive integer, or -1 for the whole row.

        Raises:
            ValueError: If it is something else.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
            raise ValueError(
                f"{self._where}: {name} must be a positive integer or -1; found {value!r}"
            )
        return value

    def finish(self) -> None:
        """Ends the reading.

        Raises:
            ValueError: If a field is left that may mean something.
        """
        left = {k for k, v in self._config.items() if v not in (None, {}, [], False)}
        left -= self._taken | self._harmless
        if left:
            raise ValueError(f"{self._where}: unsupported fields {sorted(left)}")


REGEX_CHARACTERS = frozenset(r"*+?^$()[]{}|\\")
"""What tells a regular expression from a path (a dot does not)."""

_PART, _REST = r"re:(?:.*\.)?", r"(?:\..*)?"


def part_of_name(entry: str) -> str:
    """The target of an entry that names whole components of a path, with ``*`` as a wildcard."""
    pattern = re.escape(entry).replace(r"\*", ".*")
    return f"{_PART}{pattern}{_REST}"


def substring(entry: str) -> str:
    """The target of an entry that may stand anywhere in a path."""
    return f"re:.*{re.escape(entry)}.*"


def prefix(entry: str) -> str:
    """The target of an entry that a path starts with."""
    return f"re:{re.escape(entry)}.*"


def search_pattern(pattern: str, where: str) -> str:
    """The target of a regular expression that may match anywhere in a path (`re.search`).

    Raises:
        ValueError: If it is no regular expression.
    """
    return _pattern(".*", pattern, where)


def prefix_pattern(pattern: str, where: str) -> str:
    """The target of a regular expression that has to match a path's beginning (`re.match`).

    Raises:
        ValueError: If it is no regular expression.
    """
    return _pattern("", pattern, where)


def _pattern(before: str, pattern: str, where: str) -> str:
    flags = re.match(r"\(\?([aiLmsux]+)\)", pattern)  # allowed at the very beginning only
    inner = pattern if flags is None else f"(?{flags[1]}:{pattern[flags.end() :]})"
    whole = f"{before}(?:{inner}).*"
    try:
        re.compile(pattern)
        re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    return f"re:{whole}"


def check_shape(tensors: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor, if it has this shape.

    Raises:
        ValueError: Otherwise.
    """
    found = tensors[name]
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}; found {list(found.shape)}")
    return found


def scales(tensors: Tensors, name: str, format: QFormat, shape: tuple[int, ...]) -> np.ndarray:
    """The scales of a weight [..., N, K] in their canonical shape and dtype.

    Raises:
        ValueError: If there are not as many as the config's blocks ask for.
    """
    found, wanted = tensors[name], format.scale_shape(shape)
    scalar = all(n == 1 for n in wanted) and found.size == 1
    flat_channel = found.ndim == 1 and wanted[-1] == 1 and found.shape == wanted[-2:-1]
    if scalar or flat_channel:
        found = found.reshape(wanted)
    if found.shape != wanted:
        raise ValueError(
            f"{name} must have shape {list(wanted)} for blocks {format.block_shape} of a weight "
            f"{list(shape)}; found {list(found.shape)}"
        )
    if format.scale_dtype == "float8_e8m0fnu" and found.dtype == np.uint8:
        found = found.view(ml_dtypes.float8_e8m0fnu)
    return found
