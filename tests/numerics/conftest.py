"""How hypothesis runs here, and when the one large test does."""

import pytest
from hypothesis import settings

# The same examples every time, and no deadline for slow machines.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if "large" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="takes 8 GB and minutes: choose it with -m large")
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(skip)
