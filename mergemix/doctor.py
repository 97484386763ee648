"""What this machine can run: engines, kernels, bandwidths, versions."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mergemix.identity import versions

# vLLM is imported in a process of its own: it takes seconds, prints, and a broken build may not survive it.
PROBE_VLLM = """
import json, vllm
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.model_executor.model_loader import get_model_loader
from vllm.config import LoadConfig
load_general_plugins()
loader = type(get_model_loader(LoadConfig(load_format="mergemix", model_loader_extra_config={}))).__name__
print(json.dumps({"version": vllm.__version__, "device": current_platform.device_type, "loader": loader}))
"""


def examine(*, copy_bytes: int = 1 << 28, disk_bytes: int = 1 << 28) -> dict[str, Any]:
    """Everything `mergemix doctor` shows. Takes about half a minute; writes one temporary file."""
    return {
        "machine": _machine(),
        "versions": versions(),
        "gpus": _gpus(),
        "engines": {"vllm": _probe_vllm(), "hf": _probe_hf()},
        "kernels": {"cpu": {"exact": _cpu_kernel_is_exact()}},
        "bandwidths": _bandwidths(copy_bytes, disk_bytes),
        "disk": {
            "directory": tempfile.gettempdir(),
            "free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        },
    }


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [
            line.partition(":")[2].strip()
            for line in information.read_text().splitlines()
            if "model name" in line
        ]
        cpu = models[0] if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    properties = [torch.cuda.get_device_properties(index) for index in devices]
    return [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        for p in properties
    ]


def _probe_vllm() -> dict[str, Any]:
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE_VLLM],
            capture_output=True,
            text=True,
            timeout=180,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"works": False, "reason": "importing vllm took longer than 180 s"}
    if probe.returncode != 0:
        lines = probe.stderr.strip().splitlines()
        return {"works": False, "reason": lines[-1] if lines else f"exit code {probe.returncode}"}
    return {"works": True, **json.loads(probe.stdout.strip().splitlines()[-1])}


def _probe_hf() -> dict[str, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        return {"works": False, "reason": str(error)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"works": True, "version": transformers.__version__, "device": device}


def _cpu_kernel_is_exact() -> bool:
    """Does the CPU kernel give the very bits of the reference here?"""
    import torch

    from mergemix_kernels import reference
    from mergemix_kernels.dispatch import weighted_sum

    weights = [0.4, 0.3, 0.2, 0.1]
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(100_003, generator=generator).to(torch.bfloat16) for _ in weights]
    out = torch.full_like(sources[0], float("nan"))
    weighted_sum(sources, weights, out)
    return torch.equal(out, reference.weighted_sum(sources, weights))


def _bandwidths(copy_bytes: int, disk_bytes: int) -> dict[str, float]:
    """Bytes per second. Of memory and the kernel, reads and writes both count; the disk is that of temporary files."""
    from mergemix.merge.bandwidth import copy_rate, file_rates, kernel_rate

    written, read = file_rates(Path(tempfile.gettempdir()), disk_bytes)
    return {
        "memory_copy": copy_rate(copy_bytes).bytes_per_s,
        "kernel": kernel_rate(4, nbytes=copy_bytes).bytes_per_s,
        "disk_read": read.bytes_per_s,
        "disk_write": written.bytes_per_s,
    }
