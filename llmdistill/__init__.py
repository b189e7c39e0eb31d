"""llmdistill: from unlabelled rows and a large teacher to a small student that is served."""

from llmdistill.models.register import register as _register

__version__ = "0.1.0"

_register()
