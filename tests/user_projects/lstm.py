"""A character-level LSTM: clipped gradients, a checkpoint every epoch, training resumed from one, text predicted."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

TEXT = "she sells sea shells by the sea shore, the shells she sells are sea shells for sure. " * 12
LETTERS = sorted(set(TEXT))


class Windows(Dataset):
    def __init__(self, length=32):
        self.codes = torch.tensor([LETTERS.index(letter) for letter in TEXT])
        self.length = length

    def __len__(self):
        return (len(self.codes) - self.length) // 3

    def __getitem__(self, index):
        return self.codes[3 * index : 3 * index + self.length + 1]


class LSTM(LightningModule):
    def __init__(self, size=32, layers=2, lr=1e-2, batch_size=16):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(len(LETTERS), size)
        self.lstm = nn.LSTM(size, size, num_layers=layers, batch_first=True)
        self.head = nn.Linear(size, len(LETTERS))

    def forward(self, codes, state=None):
        hidden, state = self.lstm(self.embedding(codes), state)
        return self.head(hidden), state

    def training_step(self, batch, batch_idx):
        logits, _ = self(batch[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits, _ = self(batch[:, :-1])
        self.log("val_loss", F.cross_entropy(logits.transpose(1, 2), batch[:, 1:]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        state, codes = None, batch
        for _ in range(20):
            logits, state = self(codes[:, -1:], state)
            codes = torch.cat([codes, logits[:, -1:].argmax(-1)], dim=1)
        return ["".join(LETTERS[code] for code in line) for line in codes.tolist()]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        data, world = Windows(), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, seed=1)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler, drop_last=True)


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)

    def new_trainer():
        return Trainer(
            strategy=strategy,
            accelerator=accelerator,
            devices=devices,
            max_epochs=4,
            gradient_clip_val=0.5,
            use_distributed_sampler=False,
            logger=False,
            default_root_dir=folder,
            callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        )

    first = new_trainer()
    first.fit(LSTM())
    # As after an interruption: another trainer and another model go on.
    model, second = LSTM(), new_trainer()
    second.fit(model, ckpt_path=f"{folder}/epoch=1.ckpt")
    uninterrupted, loss = (run.callback_metrics["train_loss"].item() for run in (first, second))
    prompts = torch.tensor([[LETTERS.index("s")]])
    [texts] = second.predict(model, DataLoader(prompts))
    second.print(f"{texts[0]!r}\nloss without interruption {uninterrupted:.3f}, resumed {loss:.3f}")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
