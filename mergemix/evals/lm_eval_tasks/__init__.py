"""Tasks of lm-evaluation-harness as benchmarks: asked and scored as the `lm_eval` command does, on a live engine.

lm-eval and what it needs are imported when a task is loaded, and not before.
"""

from mergemix.evals.lm_eval_tasks.load import load_lm_eval
from mergemix.evals.lm_eval_tasks.spec import LmEvalSpec, lm_eval_spec, parse_lm_eval

__all__ = ["LmEvalSpec", "lm_eval_spec", "load_lm_eval", "parse_lm_eval"]
