"""Blocks to divide, with what they are called with: those of well-known models, and some that cannot be divided."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, LENGTH, HEADS = 32, 8, 4


def hidden(seed=0):
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


class GPTBlock(nn.Module):
    """Separate q, k and v, and the number of heads written into the views."""

    def __init__(self, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (one(y).view(b, t, self.heads, d // self.heads).transpose(1, 2) for one in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Scored(GPTBlock):
    """Attention by hand, with softmax over places."""

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (one(x).view(b, t, self.heads, d // self.heads).transpose(1, 2) for one in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5).softmax(-1)
        return x + self.o((scores @ v).transpose(1, 2).reshape(b, t, d))


def _rotary(head_width):
    return {"position_embeddings": (hidden(1)[..., :head_width], hidden(2)[..., :head_width])}


def _from(model, config, find, kwargs=None, **fields):
    import transformers

    made = getattr(transformers, f"{config}Config")(**fields)
    made._attn_implementation = "sdpa"
    module = getattr(transformers, model)(made)
    return find(module), (hidden(),), kwargs or {}


_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "vocab_size": 64,
    "pad_token_id": 0,
}
_BERT = {key: _LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
_T5 = {"d_model": WIDTH, "d_ff": 64, "num_layers": 1, "num_heads": HEADS, "d_kv": WIDTH // HEADS, "vocab_size": 64}


def _bias(name="position_bias"):
    return {name: torch.zeros(2, HEADS, LENGTH, LENGTH)}


KNOWN = {
    "gpt": lambda: (GPTBlock(), (hidden(),), {}),
    "scored": lambda: (Scored(), (hidden(),), {}),
    "llama": lambda: _from("LlamaModel", "Llama", lambda m: m.layers[0], _rotary(WIDTH // HEADS), **_LLAMA),
    "mistral": lambda: _from("MistralModel", "Mistral", lambda m: m.layers[0], _rotary(WIDTH // HEADS), **_LLAMA),
    "qwen3": lambda: _from("Qwen3Model", "Qwen3", lambda m: m.layers[0], _rotary(WIDTH // HEADS), **_LLAMA),
    "opt": lambda: _from(
        "OPTModel", "OPT", lambda m: m.decoder.layers[0], **_BERT, ffn_dim=64, vocab_size=64, word_embed_proj_dim=WIDTH
    ),
    "bert": lambda: _from("BertModel", "Bert", lambda m: m.encoder.layer[0], **_BERT, intermediate_size=64),
    "vit": lambda: _from("ViTModel", "ViT", lambda m: m.layers[0], **_BERT, intermediate_size=64),
    "t5 encoder": lambda: _from("T5Model", "T5", lambda m: m.encoder.block[0], _bias(), **_T5),
    "t5 decoder": lambda: _from(
        "T5Model",
        "T5",
        lambda m: m.decoder.block[0],
        {"encoder_hidden_states": hidden(1), **_bias(), **_bias("encoder_decoder_position_bias")},
        **_T5,
    ),
    "gpt2": lambda: _from(
        "GPT2Model",
        "GPT2",
        lambda m: m.h[0],
        n_embd=WIDTH,
        n_layer=1,
        n_head=HEADS,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "torch": lambda: (nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True), (hidden(),), {}),
}


class Pair(nn.Module):
    """Two matrices and something between them."""

    def __init__(self, between, width=64):
        super().__init__()
        self.up, self.between, self.down = nn.Linear(WIDTH, width), between, nn.Linear(width, WIDTH)

    def forward(self, x):
        return x + self.down(self.between(self.up(x)))


class Same(nn.Module):
    """Uses its matrices in some way of its own."""

    def __init__(self, use):
        super().__init__()
        self.up, self.down, self.use = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), use

    def forward(self, x):
        return self.use(self, x)


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(-1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(-1).cumsum(-1).flip(-1)


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _checkpointed(module, x):
    return module.down(checkpoint(lambda y: F.gelu(module.up(y)), x, use_reentrant=False))


def _in_place(module, x):
    y = module.up(x)
    y[..., 0] = 0
    return x + module.down(y)


def _by_data(module, x):
    y = module.up(x)
    return x + module.down(y[..., : WIDTH // 2].repeat(1, 1, 2) if float(x.detach().sum()) > 1e9 else y.flip(-1))


def _looks_first(module, x):
    x = x * 1
    with torch.no_grad():
        module.up(x)
    return module.down(module.up(x))


class Tied(nn.Module):
    """Two pairs whose first matrices are one."""

    def __init__(self):
        super().__init__()
        self.up, self.also, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.also.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x).relu()) + self.down(self.also(x.flip(1)).relu())


# What is divided although it is not as usual, and must be right.
UNUSUAL = {
    "a residual inside the pair": lambda: Same(lambda m, x: m.down(m.up(x) + x)),
    "a first use without gradients": lambda: Same(_looks_first),
    "tied matrices": Tied,
    "two pairs in one": lambda: Same(lambda m, x: m.down(m.up(x) * m.up(x.flip(1)))),
    "heads mixed by a view": lambda: Pair(
        Between(lambda x: x.view(*x.shape[:-1], 16, 4).transpose(-1, -2).flatten(-2))
    ),
    "halves of one matrix": lambda: Pair(Between(lambda x: torch.cat([x[..., 32:], x[..., :32]], -1))),
    "a matrix and its transpose": lambda: Same(lambda m, x: F.linear(m.up(x), m.up.weight.t())),
    "a gate of one value": lambda: Same(lambda m, x: m.down(m.up(x) * x[..., :1].sigmoid())),
}
UNSAFE = {
    "softmax over what is divided": lambda: Pair(nn.Softmax(-1)),
    "normalised over what is divided": lambda: Pair(nn.LayerNorm(64)),
    "statistics over what is divided": lambda: Pair(Between(lambda x: x - x.mean(-1, keepdim=True))),
    "shifted along what is divided": lambda: Pair(Between(lambda x: x.roll(1, -1))),
    "flipped": lambda: Pair(Between(lambda x: x.flip(-1))),
    "sums along what is divided": lambda: Pair(Between(lambda x: x.cumsum(-1))),
    "sorted": lambda: Pair(Between(lambda x: x.sort(-1).values)),
    "an autograd function of the user": lambda: Pair(Between(Summed.apply)),
    "one matrix twice": lambda: Same(lambda m, x: m.up(F.relu(m.up(x)))),
    "a matrix that is normalised": lambda: Same(lambda m, x: m.down(F.linear(x, F.normalize(m.up.weight)))),
    "a matrix that is penalised": lambda: Same(lambda m, x: m.down(m.up(x)) + m.up.weight.square().mean()),
    "a bias that is penalised": lambda: Same(lambda m, x: m.down(m.up(x)) + m.up.bias.square().mean()),
    "recomputes a part of itself": lambda: Same(_checkpointed),
    "writes in place": lambda: Same(_in_place),
    "data decide": lambda: Same(_by_data),
    "the result is divided": lambda: Same(lambda m, x: m.up(x)),
    "an odd number of heads": lambda: GPTBlock(heads=1),
    "an odd width": lambda: Pair(nn.ReLU(), width=7),
}
ALL = {**KNOWN, **UNUSUAL, **UNSAFE}


def called(case):
    """A block of `ALL`, what it is called with, and that as names."""
    made = ALL[case]()
    block, args, kwargs = made if isinstance(made, tuple) else (made, (hidden(),), {})
    return block, [args[0].requires_grad_(), *args[1:]], kwargs
