"""How hypothesis runs here."""

from hypothesis import settings

# The same examples every time, and no deadline for slow machines.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
