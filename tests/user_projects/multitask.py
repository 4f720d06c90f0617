"""One trunk, three tasks: losses weighed by learned uncertainties, collected metrics, the trunk frozen at first."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score
from torchmetrics.regression import MeanSquaredError


def table(rows):
    """Twelve features; a number, a class of three and a flag that follow from them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 12, generator=generator)
    hidden = (x @ torch.randn(12, 5, generator=generator) / 3).tanh()
    return TensorDataset(x, hidden[:, 0] + hidden[:, 1], hidden[:, :3].argmax(1), (hidden[:, 3] > hidden[:, 4]).float())


class FreezeTrunk(BaseFinetuning):
    """The heads alone in the first epoch."""

    def freeze_before_training(self, module):
        self.freeze(module.trunk)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.trunk, optimizer, lr=module.hparams.lr)


class MultiTask(LightningModule):
    def __init__(self, width=48, blocks=3, lr=5e-3, batch_size=64):
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Linear(12, width))
        self.trunk.extend(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(blocks))
        self.heads = nn.ModuleDict(
            {"number": nn.Linear(width, 1), "class": nn.Linear(width, 3), "flag": nn.Linear(width, 1)}
        )
        self.log_variances = nn.Parameter(torch.zeros(3))
        self.flag_metrics = MetricCollection({"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}, prefix="val_flag_")
        self.number_metric = MeanSquaredError()

    def forward(self, x):
        hidden = self.trunk(x)
        return {name: head(hidden).squeeze(1) for name, head in self.heads.items()}

    @staticmethod
    def losses(output, batch):
        _, number, label, flag = batch
        return {
            "number": F.mse_loss(output["number"], number),
            "class": F.cross_entropy(output["class"], label),
            "flag": F.binary_cross_entropy_with_logits(output["flag"], flag),
        }

    def training_step(self, batch, batch_idx):
        losses = self.losses(self(batch[0]), batch)
        weighed = torch.stack([*losses.values()]) * (-self.log_variances).exp() + self.log_variances
        self.log_dict({f"train_{name}": loss for name, loss in losses.items()})
        return {"loss": weighed.sum(), "parts": {name: loss.detach() for name, loss in losses.items()}}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("train_sum", sum(outputs["parts"].values()), prog_bar=True)

    def validation_step(self, batch, batch_idx):
        output = self(batch[0])
        self.log("val_sum", sum(self.losses(output, batch).values()), sync_dist=True, prog_bar=True)
        self.flag_metrics.update(output["flag"].sigmoid(), batch[3].int())
        self.number_metric.update(output["number"], batch[1])
        self.log_dict(self.flag_metrics)
        self.log("val_mse", self.number_metric)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)

    def loader(self):
        data, world = table(1024), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    train_dataloader = val_dataloader = loader


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=5,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[FreezeTrunk(), ModelCheckpoint(folder, monitor="val_sum", save_last=True)],
    )
    trainer.fit(MultiTask())
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    trainer.print(f"flag F1 {metrics['val_flag_f1']:.3f}, mean squared error {metrics['val_mse']:.3f}")
    trainer.print(f"sum of losses: {metrics['val_sum']:.3f}")
    return metrics["val_sum"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
