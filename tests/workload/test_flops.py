import pytest
import torch

from lightning_largescale.workload.flops import count_flops


@pytest.mark.parametrize("kernel", ["efficient_attention", "flash_attention", "flash_attention_for_cpu"])
def test_attention_flops_of_heads_that_share_keys_and_values(kernel):
    query, shared = torch.empty(2, 4, 8, 16, device="meta"), torch.empty(2, 1, 8, 16, device="meta")
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward").default
    product = 2 * 2 * 4 * 8 * 8 * 16
    assert count_flops(forward, (query, shared, shared), {}, query) == 2 * product
    assert count_flops(backward, (query, query, shared, shared), {}, (query, shared, shared)) == 5 * product
