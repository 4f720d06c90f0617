"""Cache of measured rates between runs, keyed by a fingerprint of the machine and of the measurement.

Source: XDG Base Directory Specification (`XDG_CACHE_HOME`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.hardware import Rates

_log = logging.getLogger(__name__)

# Measurements expire because drivers, firmware and libraries change what a machine reaches, mostly for the better.
KEPT_SECONDS = 30 * 24 * 3600
# Increased when the meaning of a measurement changes.
_VERSION = 3


def cache_folder() -> Path:
    """Return `$LARGESCALE_CACHE`, else `lightning_largescale` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    own = os.environ.get("LARGESCALE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "lightning_largescale"


def cache_file(fingerprint: Mapping[str, Any]) -> Path:
    """Return the path of the rates measured under `fingerprint`, which has plain types that JSON can hold."""
    text = json.dumps({"version": _VERSION, **fingerprint}, sort_keys=True)
    return cache_folder() / f"rates-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def load_rates(fingerprint: Mapping[str, Any]) -> Rates | None:
    """Return the rates cached under `fingerprint`; None if the file is missing, damaged or older than 30 days."""
    path = cache_file(fingerprint)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        age_seconds = time.time() - float(kept["measured_at"])
        if kept["fingerprint"] != json.loads(json.dumps(fingerprint)) or not 0 <= age_seconds <= KEPT_SECONDS:
            return None
        return Rates.from_dict(kept["rates"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, PlanError) as error:
        _log.info("The measured rates in %s cannot be used (%s); measuring again.", path, error)
        return None


def store_rates(fingerprint: Mapping[str, Any], rates: Rates) -> None:
    """Cache `rates` under `fingerprint` atomically; if the folder cannot be written, only log that."""
    path = cache_file(fingerprint)
    kept = {"measured_at": time.time(), "fingerprint": dict(fingerprint), "rates": rates.to_dict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".rates-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=2)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        _log.info("The measured rates are not kept: %s cannot be written (%s).", path, error)
