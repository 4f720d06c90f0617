"""Plans that the authors of transformers' models declare."""

import torch
import transformers
from torch import nn

from lightning_largescale.workload import Workload
from lightning_largescale.workload.declared import declared_parts
from lightning_largescale.workload.parts import Part

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
TOKENS = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.ones(2, 8, dtype=torch.long)}


def llama(**plan):
    config = transformers.LlamaConfig(**FIELDS)
    if plan:
        config.base_model_tp_plan = {f"layers.*.{name}": style for name, style in plan.items()}
    return transformers.LlamaForCausalLM(config)


def divided(model, ranks=2):
    found = Workload.trace(model, TOKENS, step="forward", precisions=("32-true",), tp_sizes=(ranks,))
    return found.divisions[ranks]["model.layers.1"]


def test_what_is_declared():
    outer = nn.ModuleDict({"inner": llama()})
    parts = declared_parts(outer, "inner.model.layers.0")
    assert parts["self_attn.q_proj.weight"] == Part(0, (32,))
    assert parts["self_attn.k_proj.weight"] == Part(0, (16,))
    assert parts["mlp.down_proj.weight"] == Part(1, (64,))
    assert len(parts) == 7
    assert declared_parts(nn.Sequential(nn.Linear(2, 2)), "0") == {}


def test_what_is_declared_and_can_be_divided_so_is():
    found = divided(llama(**{"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}))
    assert set(found.parts) == {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    assert found.whole["self_attn.q_proj.weight"] == "the model's own plan keeps it whole"
    assert 0.5 < found.flops_share < 1


def test_what_is_declared_and_cannot_be_divided_so_is_found_instead():
    assert set(divided(llama(**{"mlp.gate_proj": "rowwise", "mlp.down_proj": "rowwise"})).parts) == set(
        divided(llama()).parts
    )
    # More ranks than there are heads of keys and values.
    few = divided(llama(), 4)
    assert {name for name in few.whole if "proj" in name} == {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}
