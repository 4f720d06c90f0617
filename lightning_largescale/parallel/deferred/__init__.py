"""Record a module's construction and replay it later: exact initialization without ever holding the full module."""

from lightning_largescale.parallel.deferred.draws import DeferredError
from lightning_largescale.parallel.deferred.recording import Recording, Source, active_recording

__all__ = ["DeferredError", "Recording", "Source", "active_recording"]
