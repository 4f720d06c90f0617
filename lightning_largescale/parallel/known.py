"""Detection of parameters that appear after a plan was applied to a module.

Such parameters are neither sharded nor averaged, so ranks would continue with different values.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.sharded import reshard, sharded_state
from lightning_largescale.plan import Plan


class KnownParameters:
    """Parameters of a module at setup.

    Args:
        module: The module, sharded or replicated.
        plan: A plan for more than one rank.

    Attributes:
        module: the module.
        plan: the plan.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.module, self.plan = module, plan
        self._names = {name for name, _ in module.named_parameters()}
        # Keep the parameters alive, so that no other object gets their ids.
        self._parameters: dict[int, Tensor] = {id(parameter): parameter for parameter in module.parameters()}
        self._stay_frozen = _of_other_dtypes(module)
        self._frozen: dict[str, Tensor] = {}

    def check(self) -> None:
        """Check that the module has no other trainable parameters; call it between steps.

        Raises:
            PlanError: Parameters were added or replaced, or a frozen one that its group cannot reduce is now trained.
        """
        for other in self._stay_frozen:
            if other.requires_grad:
                name = next(name for name, one in self.module.named_parameters() if one is other)
                dtype = str(other.dtype).removeprefix("torch.")
                raise PlanError(
                    f"parameter {name!r} of {dtype} was frozen when its block was sharded with trainable ones of"
                    " another dtype, and is trained now; let it require a gradient before fit, or replicate with"
                    " dp_replicate."
                )
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise self._error(f"parameter {name!r}, which came frozen, is not")
        if all(id(parameter) in self._parameters for parameter in self.module.parameters()):
            return
        # Unsharded parameters are other objects.
        reshard(self.module)
        for name, parameter in self.module.named_parameters():
            if id(parameter) in self._parameters:
                continue
            if parameter.requires_grad or name in self._names:
                raise self._error(f"parameter {name!r} is not")
            self._parameters[id(parameter)] = self._frozen[name] = parameter

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Check that `optimizer` has no other parameters.

        Raises:
            PlanError: It holds parameters from before the setup, or added after it.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._parameters:
                    raise self._error(
                        f"{type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is not",
                        "and the optimizer in configure_optimizers",
                    )

    def _error(self, found: str, also: str = "frozen until it is needed") -> PlanError:
        state = "replicated" if sharded_state(self.module) is None else "sharded"
        name = type(self.module).__name__.removeprefix("FSDP")
        return PlanError(
            f"{found} of {name} as it was {state}, so ranks cannot train it together; make it in __init__ or"
            f" configure_model, {also}."
        )


def _of_other_dtypes(module: nn.Module) -> list[nn.Parameter]:
    """Return frozen parameters of FSDP groups whose trainable parameters have another dtype."""
    state = sharded_state(module)
    found: list[nn.Parameter] = []
    for group in () if state is None else state.every_group():
        shards = [shard for shard, _ in compat.shards_of(group)]
        trained = {shard.dtype for shard in shards if shard.requires_grad}
        others = [shard for shard in shards if trained and shard.dtype not in trained]
        found += [shard for shard in others if shard.is_floating_point() or shard.is_complex()]
    return found
