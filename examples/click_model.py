"""Will this user click? A small DLRM on made-up clicks: tables divided by rows, towers on every process.

python examples/click_model.py --devices 2 --accelerator cpu
python examples/click_model.py --rows 20000000 --devices 2 --accelerator cpu   # 2.4 GiB of tables
"""

import argparse
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_largescale as ls

NUMBERS = 4  # features that are no ids
HISTORY = 5  # items that a user has seen


class Clicks(Dataset):
    """Users and items by Zipf's law, each with a hidden taste; a click where tastes meet."""

    def __init__(self, rows: int, samples: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        rank = torch.rand(samples, 2 + HISTORY, generator=generator)
        # A few ids make most of the samples, and most rows are never asked for.
        ids = (float(rows) ** rank).long() - 1
        self.user, self.item, self.history = ids[:, 0], ids[:, 1], ids[:, 2:]
        self.numbers = torch.randn(samples, NUMBERS, generator=generator)
        meets = self.taste(self.user, 1) * self.taste(self.item, 2) + self.taste(self.history, 2).mean(1)
        self.click = (3 * meets + self.numbers[:, 0] > 0).float()

    @staticmethod
    def taste(ids: Tensor, kind: int) -> Tensor:
        return torch.sin(ids * 12.9898 + 78.233 * kind)

    def __len__(self) -> int:
        return len(self.click)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.user[index], self.item[index], self.history[index], self.numbers[index], self.click[index]


def tower(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ClickModel(LightningModule):
    """Naumov et al. 2019: numbers through a tower, ids through tables, all pairs of the results through another."""

    def __init__(self, rows: int, dim: int = 16, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.users = nn.Embedding(rows, dim, sparse=True)
        self.items = nn.Embedding(rows, dim, sparse=True)
        self.seen = nn.EmbeddingBag(rows, dim, mode="mean", sparse=True)
        self.bottom = tower(NUMBERS, 32, dim)
        self.top = tower(dim + 6, 32, 1)
        for table in (self.users, self.items, self.seen):
            nn.init.normal_(table.weight, std=0.1)
        self.window: list[Tensor] = []

    def forward(self, user: Tensor, item: Tensor, history: Tensor, numbers: Tensor) -> Tensor:
        bottom = self.bottom(numbers)
        features = torch.stack([bottom, self.users(user), self.items(item), self.seen(history)], dim=1)
        pairs = features @ features.transpose(1, 2)
        rows, columns = torch.triu_indices(4, 4, offset=1, device=pairs.device)
        return self.top(torch.cat([bottom, pairs[:, rows, columns]], dim=1)).squeeze(1)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        *features, click = batch
        loss = F.binary_cross_entropy_with_logits(self(*features), click)
        self.window.append(loss.detach())
        if len(self.window) == 50:
            mean = self.all_gather(torch.stack(self.window)).mean()
            self.print(f"step {self.global_step + 1:4}: loss {mean:.3f}")
            self.window.clear()
        return loss

    def configure_optimizers(self):
        # One that takes sparse gradients, for tables and towers alike.
        return torch.optim.Adagrad(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of each of the three tables")
    parser.add_argument("--accelerator", default="cuda" if cuda else "cpu")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() if cuda else 2)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128, help="samples, a device and step")
    args = parser.parse_args()

    seed_everything(1)
    tables = ("users", "items", "seen")
    trainer = Trainer(
        strategy=ls.LargeScaleStrategy(ls.Plan(dp_replicate=args.devices, row_sharded_embeddings=tables)),
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    samples = args.max_steps * args.batch_size * args.devices
    trainer.fit(ClickModel(args.rows), DataLoader(Clicks(args.rows, samples), args.batch_size, shuffle=True))


if __name__ == "__main__":
    main()
