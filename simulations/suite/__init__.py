"""Runs between runs: methods × settings × seeds on the same data and the same budget, as one table."""

from corolla.simulations.suite.compare import SUITES, compare_suite, load_suite
from corolla.simulations.suite.config import Suite
from corolla.simulations.suite.table import SuiteResult

__all__ = ["SUITES", "Suite", "SuiteResult", "compare_suite", "load_suite"]
