"""The error that a user can cause: by a plan, or by a model and a machine that fit none."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan that cannot be carried out, or a wish for one; the message gives what was found and what is accepted."""


# As users import it, and as a traceback names it.
PlanError.__module__ = "lightning_largescale"
