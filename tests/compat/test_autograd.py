import pytest
import torch
from torch import nn

from lightning_largescale import compat


def test_dispatch_mode_sees_operations_and_autograd_numbers_its_nodes():
    seen = []

    class Watch(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), compat.current_node_sequence()))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Watch():
        before = compat.sequence_number()
        loss = (x * 3).sum()
        after = compat.sequence_number()
        loss.backward()
    assert ("aten.mul.Tensor", None) in seen
    assert after == before + 2
    (number,) = {number for name, number in seen if name == "aten.mul.Tensor" and number is not None}
    assert number == before
    assert compat.current_node_sequence() is None


def test_gradient_hooks():
    weight = nn.Parameter(torch.ones(2))
    assert compat.gradient_hooks(weight) == ([], [])
    weight.register_hook(torch.neg)
    weight.register_post_accumulate_grad_hook(print)
    assert compat.gradient_hooks(weight) == ([torch.neg], [print])


def test_call_after_backward():
    order = []
    weight = torch.ones(2, requires_grad=True)
    inner = weight * 2
    inner.register_hook(lambda _: order.append("backward"))
    loss = inner.sum()
    compat.call_after_backward(loss, lambda: order.append(weight.grad is not None))
    loss.backward()
    assert order == ["backward", True]


def test_current_backward():
    found = []

    def within(gradient):
        found.append(compat.current_backward())
        with torch.enable_grad():
            inner = torch.ones(1, requires_grad=True)
            weight = inner * 2
            weight.register_hook(lambda _: found.append(compat.current_backward()))
            weight.backward()

    loss = torch.ones(1, requires_grad=True) * 2
    loss.register_hook(within)
    loss.backward()
    outer, inner = found
    assert outer != inner


def test_hooks_saved_tensors():
    assert not compat.hooks_saved_tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert compat.hooks_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert compat.hooks_saved_tensors()
    assert not compat.hooks_saved_tensors()


def test_around_engine():
    x, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    asked = []

    def instead(engine, inputs, *, create_graph, accumulate):
        asked.append((create_graph, accumulate))
        return engine(tuple(other if one is x else one for one in inputs))

    undo = compat.around_engine(instead)
    try:
        from torch.autograd import grad

        (found,) = grad((3 * other).sum(), [x])
        assert found.tolist() == [3, 3]
        (3 * other).sum().backward(inputs=[x])
        (3 * other).sum().backward()
    finally:
        undo()
    assert asked == [(False, False), (False, True)]
    assert (x.grad, other.grad.tolist()) == (None, [6, 6])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad((3 * other).sum(), [x])
