"""The workloads of the golden reports, traced anew."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_largescale.workload import Workload

WIDTH, HEADS, LAYERS, VOCAB, LENGTH = 1024, 16, 12, 32000, 512
BOTH = ("32-true", "bf16-mixed")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class _Language(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = self.tokens(batch[:, :-1]) + self.places
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], 1e-3)


class _Adapted(_Language):
    """A frozen model of which a bottleneck beside each block is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.mlp.append(nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)))


class _Images(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 128, 7, stride=2, padding=3)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 1))
                for _ in range(8)
            )
        )
        self.head = nn.Linear(128, 1000)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.head(self.stages(self.stem(batch[0])).mean((2, 3))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class _Clicks(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.words = nn.Embedding(2_000_000, 64, sparse=True), nn.EmbeddingBag(500_000, 64, sparse=True)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128)) for _ in range(3))
        )
        self.head = nn.Linear(128, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        user, words, click = batch
        x = torch.cat([self.users(user), self.words(words)], -1)
        return F.binary_cross_entropy_with_logits(self.head(self.blocks(x)).squeeze(-1), click)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _built(kind: type[LightningModule]) -> LightningModule:
    with torch.device("meta"):
        return kind()


def _tokens(samples: int) -> torch.Tensor:
    return torch.zeros(samples, LENGTH + 1, dtype=torch.long)


TRACE = {
    "language": lambda: Workload.trace(_built(_Language), _tokens(4), precisions=BOTH, tp_sizes=(2, 4, 8)),
    "adapters": lambda: Workload.trace(_built(_Adapted), _tokens(4), precisions=BOTH, tp_sizes=(2, 4, 8)),
    "images": lambda: Workload.trace(
        _built(_Images), [torch.zeros(32, 3, 128, 128), torch.zeros(32, dtype=torch.long)], precisions=BOTH
    ),
    "clicks": lambda: Workload.trace(
        _built(_Clicks),
        [torch.zeros(4096, dtype=torch.long), torch.zeros(4096, 8, dtype=torch.long), torch.zeros(4096)],
        precisions=BOTH,
    ),
    "evaluated": lambda: Workload.trace(_built(_Language), _tokens(8), step="validation_step", precisions=BOTH),
    "guessed": lambda: Workload.trace(_built(_Language), None, precisions=BOTH),
}
