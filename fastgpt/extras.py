"""Packages that only some commands need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from fastgpt.config import UserError


def require(package: str, extra: str, purpose: str) -> Any:
    """The module ``package``, of the extra that installs it.

    Raises:
        UserError: it is not installed; the sentence begins with ``purpose``.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{purpose} needs the package {package}: pip install 'fastgpt[{extra}]'")
    return importlib.import_module(package)
