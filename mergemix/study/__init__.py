"""The study directory: all evidence of one search, kept safe while it grows."""

from mergemix.study.json_file import write_json
from mergemix.study.records import VERIFICATION, CandidateRecord, Estimate, ItemRecord
from mergemix.study.store import Study

__all__ = ["VERIFICATION", "CandidateRecord", "Estimate", "ItemRecord", "Study", "write_json"]
