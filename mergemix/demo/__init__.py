"""The demo's own corpora, tiny models and benchmark files: everything a search needs, made from nothing."""

from mergemix.demo.prepare import Demo, prepare_demo

__all__ = ["Demo", "prepare_demo"]
