"""Verification: do merged proxies rank mixtures as training on them does?"""

from mergemix.verify.verification import verify

__all__ = ["verify"]
