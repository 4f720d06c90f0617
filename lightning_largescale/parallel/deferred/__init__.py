"""Constructions that are recorded, and carried out later: exact initialisation of what is never held whole."""

from lightning_largescale.parallel.deferred.draws import DeferredError
from lightning_largescale.parallel.deferred.recording import Recording, Source, active_recording

__all__ = ["DeferredError", "Recording", "Source", "active_recording"]
