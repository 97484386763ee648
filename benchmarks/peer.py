"""mergekit, the peer that merges on disk: the same job by its command line."""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.children import ChildRun, run_child

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
FIND_VERSION = (
    "import importlib.metadata, json; print(json.dumps({'version': importlib.metadata.version('mergekit')}))"
)


def version(mergekit_yaml: Path) -> str:
    """mergekit's, as the Python beside its command knows it."""
    return run_child([mergekit_yaml.parent / "python", "-c", FIND_VERSION]).reported["version"]


def merge(
    mergekit_yaml: Path, experts: Mapping[str, Path], weights: Mapping[str, float], out: Path, config: Path
) -> ChildRun:
    """`mergekit-yaml` with the method "linear", as it is by default. config: where to write its input.

    Without a copy of the tokenizer, as the models have none. It leaves the writing to the disk to the system.
    """
    models = [{"model": str(path), "parameters": {"weight": weights[name]}} for name, path in experts.items()]
    # JSON is YAML.
    config.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))
    return run_child([mergekit_yaml, config, out, "--no-copy-tokenizer", "--quiet"], OFFLINE)
