"""What can go wrong in a way that a user can act on.

Each message states the rule, the value that broke it, and what to do. The command line prints the
message alone and exits with 1; everything else is a bug and keeps its traceback.
"""


class MergeMixError(Exception):
    """Root of every error meant for a user."""


class ConfigError(MergeMixError):
    """An option, a key of study.yaml or a mixture that does not make sense."""


class CheckpointError(MergeMixError):
    """A checkpoint that is missing, damaged, hostile or of a kind that cannot be averaged."""


class FamilyError(CheckpointError):
    """Checkpoints that do not agree with each other in names, shapes or dtypes."""


class NonFiniteError(CheckpointError):
    """NaN or Inf in a tensor of an expert."""


class OutputError(MergeMixError):
    """A place that cannot be written: it exists already, is read-only, or is full."""


class BenchmarkError(MergeMixError):
    """A benchmark file or an item that cannot be used."""


class StudyError(MergeMixError):
    """A study directory that is locked, damaged, or belongs to another configuration."""


class EngineError(MergeMixError):
    """An inference engine that cannot start, or that failed on a candidate."""


class PoisonedEngineError(EngineError):
    """A swap failed halfway: the engine holds mixed weights and must be rebuilt, never scored."""


class ProofError(EngineError):
    """The self-test found that live swaps do not give the weights they should."""


class CorpusError(MergeMixError):
    """A corpus that cannot be read, or a line of it that holds nothing to train on."""


class TrainingError(MergeMixError):
    """A training that cannot go on: a loss that is not a number, above all."""
