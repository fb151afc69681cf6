"""PyTorch's older files (`*.bin`, `*.ckpt`, `*.pt`), read without PyTorch and without running anything.

Such a file is a pickle beside raw numbers. A pickle is a small program, and the ordinary reader lets it call anything;
the machine here knows the few instructions that build data, and the only calls it makes are those of `CALLS`, which
describe tensors. Anything else that a file wants to call is refused by name. Two containers exist: a zip archive
(PyTorch ≥ 1.6) and pickles in a row followed by the numbers.
"""

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from flaxdiff.checkpoint.tensors import Mapped, Tensor, damaged

STORAGES = {  # what PyTorch calls a run of numbers of one dtype
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
MAGIC = 0x1950A86A20F9469CFC6C  # of the older container


class Global(NamedTuple):
    """A name that a pickle refers to, as `module.name`; never imported."""

    name: str


class Storage(NamedTuple):
    """A run of numbers: its key in the container, its dtype and length."""

    key: str
    dtype: np.dtype
    numel: int


class Strided(NamedTuple):
    """A tensor as a pickle describes it: a storage seen through an offset, a shape and strides, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def reach(self) -> int:
        """How many elements of the storage there must be from the offset on."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) if all(self.shape) else 0


class Refused(Exception):
    """A pickle asks for something that no tensor needs."""


# --- what a pickle may call -----------------------------------------------------------------------------------------


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Strided:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError("a tensor without numbers, or with other strides than axes")
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor whose shape, strides and offset are not counts")
    tensor = Strided(storage, offset, tuple(shape), tuple(strides))
    if offset + tensor.reach > storage.numel:
        raise ValueError(f"a tensor that reaches element {offset + tensor.reach} of {storage.numel}")
    return tensor


def _tensor_of_dtype(
    storage: Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Global
) -> Strided:
    typed = np.dtype(DTYPES[dtype.name.removeprefix("torch.")])  # a byte each, as the untyped storage counts
    return _tensor(storage._replace(dtype=typed), offset, shape, strides)


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        _set(found, key, value)
    return found


def _set(found: Any, key: Any, value: Any) -> None:
    # Keys are plain: hashing tuples of tuples can be made to take forever.
    if not isinstance(found, dict) or not isinstance(key, str | int | float | bytes | Global | None):
        raise ValueError(f"a {type(key).__name__} as a key of a {type(found).__name__}")
    found[key] = value


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": _dictionary,
    "torch.Size": tuple,
}


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(function, Global):
        raise ValueError(f"a call of a {type(function).__name__}")
    if function.name not in CALLS:
        raise Refused("wants to call " + re.sub(r"^(posix|nt)\.", "os.", function.name))
    return CALLS[function.name](*arguments)


def _storage(pid: Any) -> Storage:
    """What a persistent id stands for: ("storage", type, key, device, length)."""
    sort, kind, key, _, numel, *view = pid
    if sort != "storage" or type(numel) is not int or numel < 0 or any(v is not None for v in view):
        raise ValueError("a reference to something other than a storage")
    return Storage(str(key), np.dtype(STORAGES[kind.name.rpartition(".")[2]]), numel)


# --- the machine ----------------------------------------------------------------------------------------------------


class _Machine:
    """The stack (a new one begins at each mark) and the memory of a pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memory: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise ValueError("nothing on the stack")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, key: int) -> None:
        self.memory[key] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(self.stack[-1], key, value)

    def refer(self) -> None:
        (pid,) = self.take(1)
        if pid[0] == "module":  # the older container adds a class's source text to its name
            self.push(pid[1])
        else:
            storage = _storage(pid)
            self.storages[storage.key] = storage
            self.push(storage)

    def call(self) -> None:
        function, arguments = self.take(2)
        self.push(_call(function, arguments))


def _nothing(m: _Machine, _: Any) -> None: ...


_OPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"), _Machine.push),
    **dict.fromkeys(("BINFLOAT", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES", "SHORT_BINBYTES"), _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "MARK": lambda m, _: m.mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.take(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.take(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.take(3))),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "DICT": lambda m, _: (items := m.since_mark(), m.push({}), m.update(items)),
    "APPEND": lambda m, _: m.append(m.take(1)),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.take(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "POP": lambda m, _: m.take(1),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda m, _: m.put(len(m.memory)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, key: m.push(m.memory[key])),
    "GLOBAL": lambda m, name: m.push(Global(name.replace(" ", "."))),
    "STACK_GLOBAL": lambda m, _: m.push(Global(".".join(m.take(2)))),
    "BINPERSID": lambda m, _: m.refer(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call()),
    "BUILD": lambda m, _: m.take(1),  # attributes of a dictionary, such as the versions of its modules
}


def _run(code: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """The value of the pickle that begins here, and the storages that it refers to."""
    machine = _Machine()
    for op, argument, _ in pickletools.genops(code):
        if op.name == "STOP":
            return machine.stack.pop(), machine.storages
        if op.name not in _OPS:
            raise Refused(f"uses the pickle instruction {op.name}")
        _OPS[op.name](machine, argument)
    raise ValueError("no end")


# --- the two containers ---------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Tensor]:
    """What a PyTorch file holds; no number is read yet.

    Of a training checkpoint, its `state_dict`. What is not a tensor is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or not from PyTorch, or wants something to be called: the error says what.
    """
    pick = lambda state: state.get("state_dict", state)
    return {n: t for n, t in contents(path, pick).items() if isinstance(t, Tensor) and isinstance(n, str)}


def contents(path: Path, pick: Callable[[Any], Any] = lambda state: state) -> Any:
    """All that a PyTorch file holds, or what `pick` takes of it: plain values, and `Tensor` where a tensor is.

    Raises as `read` does.
    """
    file = Mapped(path)
    container = _archive if file[:4] == b"PK\x03\x04" else _sequence
    try:
        state, place = container(file)

        def mapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: mapped(one) for key, one in value.items()}
            return _mapped(file, value, *place(value.storage)) if isinstance(value, Strided) else value

        return mapped(pick(state))
    except Refused as error:
        raise ValueError(
            f"{path} {error}. Nothing in a pickle is run here: if you trust the file, convert it to "
            "safetensors where PyTorch is installed; if not, delete it."
        ) from error
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        zipfile.BadZipFile,
        EOFError,
        RecursionError,
    ) as error:
        raise damaged(path, f"it is not a PyTorch file of tensors ({error})") from error


def _mapped(file: Mapped, tensor: Strided, start: int, crc: int | None) -> Tensor:
    """A described tensor as bytes of the file; `start` is where its storage begins."""
    (_, dtype, numel), size = tensor.storage, tensor.storage.dtype.itemsize
    if start + numel * size > file.size:
        raise ValueError(f"numbers up to byte {start + numel * size:,} in a file of {file.size:,}")
    ordered = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    strides = None if ordered == tensor.strides else tensor.strides
    whole = tensor.reach == numel
    return Tensor(
        file, start + tensor.offset * size, tensor.reach * size, dtype, tensor.shape, strides, crc if whole else None
    )


Place = Callable[[Storage], tuple[int, int | None]]  # where a storage begins, and its checksum


def _archive(file: Mapped) -> tuple[Any, Place]:
    """A zip: data.pkl, and one uncompressed member for each storage."""
    with zipfile.ZipFile(file.path) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("it is compressed")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        state, _ = _run(io.BytesIO(archive.read(members["data.pkl"])))

    def place(storage: Storage) -> tuple[int, int]:
        info = members[f"data/{storage.key}"]
        if info.file_size < storage.numel * storage.dtype.itemsize:
            raise ValueError(f"{info.filename} has {info.file_size:,} bytes for {storage.numel:,} numbers")
        lengths = file[info.header_offset + 26 : info.header_offset + 30]  # of the member's name and its extra field
        return info.header_offset + 30 + sum(np.frombuffer(lengths, "<u2").tolist()), info.CRC

    return state, place


def _sequence(file: Mapped) -> tuple[Any, Place]:
    """Pickles in a row (magic number, version, machine, data, the storages' keys), then each storage and its length."""
    with open(file.path, "rb") as f:
        if _run(f)[0] != MAGIC:
            raise ValueError("it does not begin as one")
        _, (machine, _), (state, storages), (keys, _) = (_run(f) for _ in range(4))
        if machine.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian")
        begin = f.tell()
    starts = {}
    for key in map(str, keys):
        count, storage = int.from_bytes(file[begin : begin + 8], "little"), storages[key]
        if count != storage.numel:
            raise ValueError(f"{count:,} numbers where {storage.numel:,} should be")
        starts[key] = begin + 8
        begin += 8 + count * storage.dtype.itemsize
    return state, lambda storage: (starts[storage.key], None)
