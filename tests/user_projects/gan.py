"""A GAN of points around a circle: manual optimisation, two optimizers, each toggled."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def circle(points):
    angles = torch.rand(points) * 2 * torch.pi
    return torch.stack([angles.cos(), angles.sin()], dim=1) * 2 + torch.randn(points, 2) * 0.05


def network(inputs, outputs, hidden=64):
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, outputs),
    )


class GAN(LightningModule):
    def __init__(self, latent=8, lr=2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = network(latent, 2)
        self.discriminator = network(2, 1)

    def forward(self, noise):
        return self.generator(noise)

    @staticmethod
    def adversarial(logits, real):
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch, batch_idx):
        [real] = batch
        generator, discriminator = self.optimizers()
        noise = torch.randn(len(real), self.hparams.latent, device=self.device)

        self.toggle_optimizer(generator)
        g_loss = self.adversarial(self.discriminator(self(noise)), real=True)
        generator.zero_grad()
        self.manual_backward(g_loss)
        generator.step()
        self.untoggle_optimizer(generator)

        self.toggle_optimizer(discriminator)
        fake = self(noise).detach()
        d_loss = (
            self.adversarial(self.discriminator(real), real=True)
            + self.adversarial(self.discriminator(fake), real=False)
        ) / 2
        discriminator.zero_grad()
        self.manual_backward(d_loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def test_step(self, batch, batch_idx):
        [noise] = batch
        self.log("distance", (self(noise).norm(dim=1) - 2).abs().mean(), sync_dist=True)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [
            torch.optim.Adam(network.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


class ShowRadius(Callback):
    """Every process generates, and the first one says what came out."""

    def on_train_epoch_end(self, trainer, module):
        with torch.no_grad():
            points = module(torch.randn(64, module.hparams.latent, device=module.device))
        module.log("radius", points.norm(dim=1).mean(), sync_dist=True)


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=6,
        logger=False,
        default_root_dir=folder,
        callbacks=[ShowRadius()],
    )
    model = GAN()
    trainer.fit(model, DataLoader(TensorDataset(circle(1024)), batch_size=64 // devices, shuffle=True))
    noise = TensorDataset(torch.randn(256, model.hparams.latent))
    [metrics] = trainer.test(model, DataLoader(noise, batch_size=32), verbose=False)
    trainer.print(f"mean distance from the circle: {metrics['distance']:.3f}")
    return metrics["distance"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
