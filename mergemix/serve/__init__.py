"""Serving mixtures: one engine protocol, real vLLM and transformers behind it. Light to import."""

from mergemix.serve.open import open_engine, resolve_kind

__all__ = ["open_engine", "resolve_kind"]
