"""Private APIs of DTensor."""

from __future__ import annotations

from typing import Any


def local_tensor(parameter: Any) -> Any:
    """Return this rank's shard of the DTensor `parameter`, with the version counter that it has there.

    Replaced by `DTensor.to_local`, if its result shared that counter.
    """
    return parameter._local_tensor


def divided_as(like: Any, local: Any) -> Any:
    """Return a DTensor of the size and placements of the DTensor `like` whose shard is `local`, which is not moved.

    Replaced by `DTensor.from_local`, which copies a shard in DRAM to the device type of the mesh.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    made: Any = DTensor
    return made(local, DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta), requires_grad=False)


def forget_cached_meshes() -> None:
    """Clear DTensor's sharding caches of this thread, which keep meshes, and these their process groups.

    Replaced by caches that keep no mesh, or by a public way to clear them.
    """
    from torch.distributed.tensor import DTensor, debug

    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    # Not in torch 2.11.
    getattr(debug, "_clear_sharding_prop_cache", propagator.propagate_op_sharding.cache.cache_clear)()


def forget_cached_meshes_of_backward(device_type: str) -> None:
    """Clear DTensor's sharding caches of this thread and of the current device's backward thread.

    The caches take meshes of equal shape for one mesh, whatever their process groups are, and give the result of an
    operator the mesh that they met first, whose groups may be destroyed or lack a backend.

    Replaced by meshes that are equal only if their groups are, or by a public way to clear these caches.
    """
    import torch

    class Clearing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Any) -> Any:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            forget_cached_meshes()
            return gradient

    forget_cached_meshes()
    with torch.enable_grad():
        seen: Any = Clearing.apply(torch.zeros((), device=device_type, requires_grad=True))  # type: ignore[no-untyped-call]
    torch.autograd.backward(seen)


def differentiate_placing_twice() -> None:
    """Make second derivatives pass through `DTensor.from_local` whose gradient has other placements than its input.

    torch redistributes such a gradient without a graph, so that second derivatives are silently wrong; its own styles
    of tensor parallelism are affected wherever they take a local tensor. In force for the life of the process.

    Replaced by a differentiable redistribution in torch, whose comment there announces it.
    """
    import torch
    from torch.distributed.tensor import _api

    function: Any = _api._FromTorchTensor
    plain = function.backward
    if getattr(plain, "differentiates", False):
        return

    def backward(ctx: Any, gradient: Any) -> Any:
        if gradient is not None and torch.is_grad_enabled() and gradient.requires_grad:
            # torch 2.11 may have neither, and gives a gradient the placements of the input.
            normalize = getattr(_api, "_normalize_placements_for_grad", tuple)
            placements = getattr(ctx, "grad_placements", None) or normalize(ctx.forward_input_placements)
            gradient = gradient.redistribute(ctx.forward_input_device_mesh, placements)
        return plain(ctx, gradient)

    backward.differentiates = True  # type: ignore[attr-defined]
    function.backward = staticmethod(backward)
