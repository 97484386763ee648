"""The study directory: all evidence of one search, kept safe while it grows."""

from mergemix.study.records import CandidateRecord, ItemRecord
from mergemix.study.store import Study

__all__ = ["CandidateRecord", "ItemRecord", "Study"]
