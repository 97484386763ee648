"""Which files of this machine a Python interpreter with its standard library needs: those, no others."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass

from mergemix.errors import ConfigError

# Asks a fresh interpreter: loads every extension module of the standard library, then looks at its own mappings.
_QUESTION = """
import importlib, json, os, sys, sysconfig
folder = sysconfig.get_config_var("DESTSHARED") or ""
modules = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
unwanted = [n for n in modules if n.startswith(("_ctypes", "_test", "_xx", "xx", "_interp", "_remote_debugging"))]
for name in modules:
    if name not in unwanted and not name.startswith("_tkinter"):
        try:
            importlib.import_module(name.partition(".")[0])
        except ImportError:
            pass
with open("/proc/self/maps") as maps:
    mapped = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/") and " r-xp " in line}
library = sorted({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})
print(json.dumps({
    "python": os.path.realpath(sys.executable),
    "library": library,
    "mapped": sorted(path for path in mapped if path.startswith("/")),
    "unwanted": [os.path.join(os.path.realpath(folder), name) for name in unwanted],
}))
"""
_EXTRAS = ("/dev/null", "/etc/ld.so.cache", "/usr/share/zoneinfo")
_ROOT_LINKS = ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin")


@dataclass(frozen=True)
class PythonFiles:
    """What the sandbox shows: `binds` read-only, `masks` among them empty; `links` of the root, by name."""

    python: str
    binds: tuple[str, ...]
    masks: tuple[str, ...]
    links: dict[str, str]


def outer_environment() -> dict[str, str]:
    """The environment of the sandbox's processes: nothing, but where an interpreter needs to find its libraries."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {"MALLOC_ARENA_MAX": "2"}  # an arena per thread would use up the address space


def base_python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _names(path: str) -> set[str]:
    """The paths under which a shared library is looked for: itself, and links to it where libraries lie."""
    names = {path}
    for folder in {os.path.dirname(path), "/lib64", "/lib"}:
        try:
            with os.scandir(folder) as entries:
                links = [entry.name for entry in entries if entry.is_symlink()]
        except OSError:
            continue
        there = os.path.realpath(folder)
        names |= {f"{there}/{name}" for name in links if os.path.realpath(f"{there}/{name}") == path}
    return names


@functools.cache
def python_files() -> PythonFiles:
    """Looks once. Raises ConfigError where the interpreter does not start in an empty environment."""
    command = [base_python(), "-I", "-S", "-c", _QUESTION]
    try:
        done = subprocess.run(
            command,
            env=outer_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=True,
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"the sandbox cannot ask {command[0]} which files it needs: {error}") from error
    library = [path for path in found["library"] if os.path.isdir(path)]
    inside = tuple(f"{path}/" for path in library)
    single = {found["python"]}
    for path in found["mapped"]:
        if os.path.isfile(path) and not path.startswith(inside):
            single |= _names(os.path.realpath(path))
    packages = [f"{path}/{name}" for path in library for name in ("site-packages", "dist-packages")]
    return PythonFiles(
        python=found["python"],
        binds=(*library, *sorted(single), *filter(os.path.exists, _EXTRAS)),
        masks=(*filter(os.path.isdir, packages), *found["unwanted"]),
        links={path: os.readlink(path) for path in _ROOT_LINKS if os.path.islink(path)},
    )
