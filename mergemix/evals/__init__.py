"""Benchmarks, grading, utility and the statistics that say how far a score can be trusted."""
