"""Hypothesis that tries the same examples each time, however slow the machine, whatever ran before."""

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# It draws from the constants of all modules of ours that happen to be loaded, so examples would depend on other tests.
providers._get_local_constants = providers.Constants

FIXED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("fixed", FIXED)
settings.load_profile("fixed")
