"""Models of several families as ordinary LightningModules with random weights and random data.

Each takes a width and gives a module; `batches` gives data of the right shape. Sizes are chosen to be large beside the
process and small beside the machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY = 8192


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BHTE.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class GPT(nn.Module):
    """A decoder; `tied` shares the embedding with the head."""

    def __init__(self, width: int, layers: int, *, tied: bool = False, length: int = 1024) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.token(tokens_BT) + self.place.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class GatedBlock(nn.Module):
    """A block of Llama's kind, by torch alone: RMS norms, rotated queries and keys, a gated product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, max(1, heads // 4)
        inner, own = 256 * -(-8 * width // 3 // 256), width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, self.groups * own, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor, angles_TE: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        normed = self.norm1(x_BTD)
        q, k, v = (
            one.view(B, T, heads, -1).transpose(1, 2)
            for one, heads in (
                (self.query(normed), self.heads),
                (self.key(normed), self.groups),
                (self.value(normed), self.groups),
            )
        )
        q, k = rotated(q, angles_TE), rotated(k, angles_TE)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        normed = self.norm2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotated(x: Tensor, angles_TE: Tensor) -> Tensor:
    """Source: Su et al. 2021, "RoFormer", section 3.2; halves in the place of neighbours."""
    one, other = x.chunk(2, -1)
    sine, cosine = angles_TE.sin().to(x.dtype), angles_TE.cos().to(x.dtype)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)


class Llama(nn.Module):
    """A decoder of gated blocks."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.own = width // max(1, width // 64)
        self.blocks = nn.ModuleList(GatedBlock(width, max(1, width // 64)) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.token(tokens_BT)
        steps = torch.arange(0, self.own, 2, device=x_BTD.device) / self.own
        angles_TE = torch.outer(torch.arange(tokens_BT.shape[1], device=x_BTD.device), 10000.0**-steps)
        for block in self.blocks:
            x_BTD = block(x_BTD, angles_TE)
        return self.head(self.norm(x_BTD))


class ConvBlock(nn.Module):
    """Two convolutions with batch normalisation around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(x_BCHW + self.body(x_BCHW))


class Language(LightningModule):
    """Next-token prediction with any model that maps tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        (tokens_BT,) = batch
        logits_BTV = self.model(tokens_BT[:, :-1])
        logits_BTV = getattr(logits_BTV, "logits", logits_BTV)
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Classifier(Language):
    """Classification with any model that maps inputs to ten logits."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        inputs, labels_B = batch
        logits_BC = self.model(inputs)
        return F.cross_entropy(getattr(logits_BC, "logits", logits_BC), labels_B)


def gpt(width: int, layers: int = 8, *, tied: bool = False) -> LightningModule:
    return Language(GPT(width, layers, tied=tied))


def mlp(width: int, layers: int = 8) -> LightningModule:
    body = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)]
    return Classifier(nn.Sequential(nn.Linear(784, width), *body, nn.Linear(width, 10)))


def conv(width: int, layers: int = 6) -> LightningModule:
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return Classifier(nn.Sequential(stem, *(ConvBlock(width) for _ in range(layers)), head))


def llama(width: int, layers: int = 6) -> LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        use_cache=False,
    )
    return Language(LlamaForCausalLM(config))


def llama_plain(width: int, layers: int = 6) -> LightningModule:
    return Language(Llama(width, layers))


def bert(width: int, layers: int = 6) -> LightningModule:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    return Language(BertForMaskedLM(config))


def vit(width: int, layers: int = 6) -> LightningModule:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=96,
        patch_size=8,
        num_labels=10,
    )
    return Classifier(ViTForImageClassification(config))


FAMILIES: dict[str, Callable[[int], LightningModule]] = {
    "gpt": gpt,
    "gpt-tied": lambda width: gpt(width, tied=True),
    "mlp": mlp,
    "conv": conv,
    "llama": llama,
    "llama-plain": llama_plain,
    "bert": bert,
    "vit": vit,
}


def batches(family: str, batch: int, steps: int, *, length: int = 256) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of `steps` batches of `batch` samples; every rank gets its own when it draws from a different seed."""
    count = batch * steps
    labels = torch.randint(0, 10, (count,))
    data = {
        "mlp": lambda: TensorDataset(torch.randn(count, 784), labels),
        "conv": lambda: TensorDataset(torch.randn(count, 3, 64, 64), labels),
        "vit": lambda: TensorDataset(torch.randn(count, 3, 96, 96), labels),
    }.get(family, lambda: TensorDataset(torch.randint(0, VOCABULARY, (count, length + 1))))
    return DataLoader(data(), batch_size=batch)
