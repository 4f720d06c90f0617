import logging

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lightning_largescale import compat


def test_fakes_have_no_data():
    mode = compat.fake_tensor_mode()
    with mode:
        fake = torch.randn(2**40)
    assert compat.is_fake(fake)
    assert not compat.is_fake(torch.ones(1))
    with mode, pytest.raises(compat.data_dependent_errors()):
        fake.sum().item()
    with mode, pytest.raises(compat.data_dependent_errors()):
        fake.nonzero()
    with mode, compat.without_dispatch_modes():
        assert torch.ones(1).item() == 1.0


def test_silent_fakes(caplog):
    def fail():
        with compat.fake_tensor_mode(), pytest.raises(RuntimeError):
            torch.mm(torch.ones(2, 2), torch.ones(3, 3))

    with compat.silent_fakes():
        fail()
    assert caplog.records == []
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    assert not logger.disabled


def test_mutated_arguments():
    assert compat.mutated_arguments(torch.ops.aten.add_.Tensor) == (0,)
    assert compat.mutated_arguments(torch.ops.aten.add.out) == ("out",)
    assert compat.mutated_arguments(torch.ops.aten.add.Tensor) == ()


def test_function_modes_are_left_for_a_while():
    class Seen(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(2)
        assert seen.count == 1
        with compat.without_function_modes():
            torch.ones(2)
        assert seen.count == 1


def test_a_condition_that_a_device_checks():
    compat.assert_async(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="is said"):
        compat.assert_async(torch.tensor(False), "is said")


def test_argument():
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    x = torch.ones(1, 1, 2, 4)
    assert compat.argument(attend, "dropout_p", (x, x, x), {}, None) == 0.0
    assert compat.argument(attend, "dropout_p", (x, x, x, 0.5), {}, None) == 0.5
    assert compat.argument(attend, "dropout_p", (x, x, x), {"dropout_p": 0.25}, None) == 0.25
    assert compat.argument(torch.ops.aten.mm.default, "dropout_p", (x, x), {}, 1.0) == 1.0


def test_is_operator():
    assert compat.is_operator(torch.ops.aten.mm.default)
    assert not compat.is_operator(torch.ops.higher_order.cond)


def test_foreach_kind():
    kinds = {torch._foreach_norm: "norms", torch._foreach_mul_: "in place", torch._foreach_mul: None, torch.stack: None}
    assert {function: compat.foreach_kind(function) for function in kinds} == kinds
    assert compat.foreach_kind(torch._amp_foreach_non_finite_check_and_unscale_) == "unscale"
    assert compat.foreach_kind(object()) is None


def test_view_base_and_view_base_getter():
    whole = torch.ones(4)
    assert compat.view_base(whole) is None
    with Functions() as functions:
        assert compat.view_base(whole[1:]) is whole
    assert compat.view_base_getter() in functions.seen


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_function_getter_and_setter():
    tensor = torch.zeros(2)
    with Functions() as functions:
        device, tensor.data = tensor.device, torch.ones(2)
    assert device.type == "cpu"
    assert compat.function_getter("device") in functions.seen
    assert compat.function_setter("data") in functions.seen


def test_returns_tensors():
    aten = torch.ops.aten
    kinds = [aten.add.Tensor, aten.unbind.int, aten.qr.default, aten._local_scalar_dense.default, aten.equal.default]
    assert [compat.returns_tensors(kind) for kind in kinds] == [True, True, True, False, False]


def test_returns_views():
    aten = torch.ops.aten
    kinds = [aten.select.int, aten.split.Tensor, aten.detach.default, aten.add.Tensor, aten.add_.Tensor]
    assert [compat.returns_views(kind) for kind in kinds] == [True, True, True, False, False]
