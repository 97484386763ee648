"""Entry point `vllm.general_plugins`: called in every vLLM process, also those that never merge anything."""

from __future__ import annotations

import logging

LOAD_FORMAT = "mergemix"


def register() -> None:
    """Make `--load-format mergemix` known to vLLM; harmless where this vLLM cannot take it."""
    try:
        from vllm.model_executor.model_loader import register_model_loader

        from mergemix.serve.vllm_loader import MergeLoader
    except ImportError as error:
        logging.getLogger(__name__).warning("load format %s is not available: %s", LOAD_FORMAT, error)
        return
    register_model_loader(LOAD_FORMAT)(MergeLoader)
