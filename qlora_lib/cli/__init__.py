"""The command ``qlora``: estimate, quantize, fine-tune, ask, merge.

Results go to the standard output and all else to the standard error. Modules that take
long to import are imported by the commands that need them.
"""

from qlora_lib.cli.app import app

__all__ = ["app"]
