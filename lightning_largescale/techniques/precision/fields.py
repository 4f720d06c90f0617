"""Field of the arithmetic of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import PlanFields, check_choice

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware

# The data type of each precision's matrix products; the hardware must support it.
MATMUL_TYPE = {
    "32-true": "float32",
    "bf16-mixed": "bfloat16",
    "16-mixed": "float16",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "64-true": "float64",
}


@dataclass(frozen=True, kw_only=True)
class PrecisionFields(PlanFields):
    """Arithmetic of the step.

    Attributes:
        precision: Lightning's name of the precision: "32-true"; "bf16-mixed" or "16-mixed", matrix products in 16 bits
            and weights in float32; "bf16-true", "16-true" or "64-true", weights and everything else in that type.
    """

    __slots__ = ()
    precision: str = "32-true"

    @property
    def matmul_dtype(self) -> str:
        """Data type of the matrix products, as torch names it."""
        return MATMUL_TYPE[self.precision]

    @property
    def scales_gradients(self) -> bool:
        """Return whether a gradient scaler, which needs all gradients at once, is on the device."""
        return self.precision == "16-mixed"

    def _check_values(self) -> Mapping[str, object]:
        check_choice(self, "precision", tuple(MATMUL_TYPE))
        return {}

    def _check_hardware(self, hardware: Hardware) -> None:
        if hardware.rates is not None and hardware.rates.matmul_rate(self.matmul_dtype) is None:
            raise PlanError(
                f"precision={self.precision!r} needs matrix products in {self.matmul_dtype}, which {hardware.name}"
                " cannot compute; use '32-true'."
            )

    def _words(self) -> Iterable[str]:
        return (self.precision,)
