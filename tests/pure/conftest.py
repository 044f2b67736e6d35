"""How long hypothesis looks: `HYPOTHESIS_PROFILE=long pytest --timeout 0 tests/pure` looks much longer."""

import os

from hypothesis import HealthCheck, settings

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("quick", max_examples=100, deadline=None, suppress_health_check=CHECKS)
settings.register_profile("long", max_examples=2_000, deadline=None, suppress_health_check=CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
