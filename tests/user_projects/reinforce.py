"""Policy gradient: episodes played inside an iterable dataset's batches, manual optimisation, a learned baseline."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader, IterableDataset


class Catch:
    """Many games at once: a ball falls seven rows; one point for being below it, on seven columns, at the end."""

    def __init__(self, games, generator):
        self.ball, self.paddle = torch.randint(7, (2, games), generator=generator)
        self.row = 0

    def observe(self):
        row = torch.full_like(self.ball, self.row)
        return torch.cat([nn.functional.one_hot(x, 7) for x in (self.ball, self.paddle, row)], dim=1).float()

    def act(self, action):
        """Take -1, 0 or 1 steps; the reward, and whether the game is over."""
        self.paddle = (self.paddle + action - 1).clamp(0, 6)
        self.row += 1
        over = self.row == 6
        return (self.paddle == self.ball).float() * over, over


class Seeds(IterableDataset):
    """Seeds of games, different on each process."""

    def __init__(self, trainer, batches):
        self.trainer, self.batches = trainer, batches

    def __iter__(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        first = self.trainer.current_epoch * self.batches
        return (torch.tensor(world * (first + batch) + rank) for batch in range(self.batches))


class Reinforce(LightningModule):
    def __init__(self, hidden=64, lr=1e-2, games=64, entropy=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.policy = nn.Sequential(nn.Linear(21, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        self.value = nn.Sequential(nn.Linear(21, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def play(self, seed):
        """Log-probabilities, entropies, values, each (turns, games), and the points of each game."""
        generator = torch.Generator().manual_seed(int(seed))
        game, turns, over = Catch(self.hparams.games, generator), [], False
        while not over:
            seen = game.observe().to(self.device)
            choice = Categorical(logits=self.policy(seen))
            action = torch.multinomial(choice.probs.cpu(), 1, generator=generator).squeeze(1)
            reward, over = game.act(action)
            turns.append((choice.log_prob(action.to(self.device)), choice.entropy(), self.value(seen).squeeze(1)))
        return *(torch.stack(part) for part in zip(*turns, strict=True)), reward.to(self.device)

    def training_step(self, seed, batch_idx):
        log_prob, entropy, value, points = self.play(seed)
        advantage = points - value
        loss = -(log_prob * advantage.detach()).mean() + advantage.pow(2).mean() - self.hparams.entropy * entropy.mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        self.log("points", points.mean(), prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_epoch_end(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], gamma=0.3)]


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=5,
        logger=False,
        callbacks=[ModelCheckpoint(folder, monitor="points", mode="max")],
    )
    trainer.fit(Reinforce(), DataLoader(Seeds(trainer, batches=30), batch_size=None))
    points = trainer.callback_metrics["points"].item()
    trainer.print(f"balls caught: {points:.3f}")
    return points


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
