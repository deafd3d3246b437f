"""Where a benchmark ran: what its result holds beside the figures."""

import os
import platform
from datetime import date
from importlib.metadata import version


def about(*packages: str) -> dict:
    """The date, the machine, its GPU or "cpu", Python, and the versions of these packages."""
    import torch  # at the end: it is no part of what chat.py and course.py measure

    return {
        "date": str(date.today()),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
