"""The compiled loops as native functions: numba compiles them once, and their machine code is kept on disk.

Loading it takes llvmlite alone: importing numba, and all that it needs to know to call a function of its own cache,
takes a second, which is most of a small merge.
"""

import ctypes
import hashlib
import os
import platform
import struct
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCES = ("cpu_loops.py", "cpu_intrinsics.py", "cpu_tiles.py")
DIGEST_BYTES = 32

Loop = Callable[..., int]  # of integers; returns the loop's uint32

_lock = threading.RLock()
_engines: list[Any] = []  # the machine code lives as long as they do


def loop(name: str, dtype: str) -> Loop:
    """A loop of `cpu_loops` for a dtype. Calls release the GIL. Compiled where no kept machine code fits."""
    with _lock:  # two threads must not compile the same
        return _loop(name, dtype)


@cache
def _loop(name: str, dtype: str) -> Loop:
    file = f"{name}-{dtype}-{_key()}.bin"
    code = next((kept for place in _places() if (kept := _read(place / file))), None)
    if code is None:
        from mergemix_kernels.cpu_loops import compile_loop

        code = _pack(*compile_loop(name, dtype))
        for place in _places():
            if _write(place / file, code):
                break
    return _callable(*_unpack(code))


def _pack(symbol: str, count: int, machine_code: bytes) -> bytes:
    return struct.pack("<HH", len(symbol), count) + symbol.encode() + machine_code


def _unpack(code: bytes) -> tuple[str, int, bytes]:
    length, count = struct.unpack_from("<HH", code)
    return code[4 : 4 + length].decode(), count, code[4 + length :]


def _callable(symbol: str, count: int, machine_code: bytes) -> Loop:
    """The function of `count` integers that the object code holds."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    _engines.append(engine)
    pointers = (ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p))
    native = ctypes.CFUNCTYPE(ctypes.c_int32, *pointers, *[ctypes.c_int64] * count)(
        engine.get_function_address(symbol)
    )

    def call(*arguments: int) -> int:
        result, exception = ctypes.c_uint32(), ctypes.c_void_p()
        status = native(result, exception, *arguments)
        assert status == 0, "the loops raise nothing"
        return result.value

    return call


@cache
def _key() -> str:
    """What the machine code depends on: the sources, the compiler, the processor."""
    from llvmlite import binding

    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    versions = (platform.python_version(), metadata.version("numba"), metadata.version("llvmlite"))
    processor = (platform.machine(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest.update(repr((versions, processor)).encode())
    return digest.hexdigest()[:24]


def _places() -> list[Path]:
    """Where machine code may be kept, best first: beside the source, else in the user's cache directory."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(__file__).parent / "__pycache__", Path(user) / "mergemix"]


def _read(path: Path) -> bytes | None:
    """What `_write` wrote; None where it is absent or not whole."""
    with suppress(OSError):
        data = path.read_bytes()
        digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


def _write(path: Path, code: bytes) -> bool:
    """Whether it could be kept. No merge fails because a disk is full or read-only."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            os.fchmod(file.fileno(), 0o644)
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        return False
    return True
