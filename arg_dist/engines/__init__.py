"""Engine adapters, one file per engine: which fragment of which parameter a process holds.

Importing this package registers all of them. No adapter imports its engine before it is in use.
"""

import pkgutil
from importlib import import_module

for _module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
    import_module(f"{__name__}.{_module.name}")
