"""A BERT built from its config tells texts apart: decay by parameter group, warm-up, a confusion matrix."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics.classification import BinaryAccuracy, BinaryConfusionMatrix
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


class Sentences(Dataset):
    """Tokens, padded; the label says whether the first is a high one."""

    def __init__(self, sentences, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(2, 20, (sentences, 12), generator=generator)
        self.lengths = torch.randint(4, 13, (sentences,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        mask = (torch.arange(12) < self.lengths[index]).long()
        tokens = self.tokens[index]
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": (tokens[0] > 10).long()}


class TextClassifier(LightningModule):
    def __init__(self, lr=3e-3, weight_decay=0.01, batch_size=32, **config):
        super().__init__()
        self.save_hyperparameters()
        self.bert = BertForSequenceClassification(BertConfig(**config))
        self.accuracy = BinaryAccuracy()
        self.confusion = BinaryConfusionMatrix()

    def forward(self, **batch):
        return self.bert(**batch)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", self.lr_schedulers().get_last_lr()[0])
        return loss

    def validation_step(self, batch, batch_idx):
        output = self(**batch)
        predicted = output.logits.argmax(-1)
        self.accuracy(predicted, batch["labels"])
        self.confusion(predicted, batch["labels"])
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        self.log("val_loss", output.loss, sync_dist=True)

    def on_validation_epoch_end(self):
        self.print(self.confusion.compute().tolist())
        self.confusion.reset()

    def configure_optimizers(self):
        decayed = [p for name, p in self.named_parameters() if not name.endswith("bias") and "LayerNorm" not in name]
        others = [p for name, p in self.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.hparams.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.hparams.lr,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        data, world = Sentences(640, seed=0), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, seed=1)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    def val_dataloader(self):
        data, world = Sentences(128, seed=1), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"intermediate_size": 64, "max_position_embeddings": 16, "num_labels": 2}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    trainer = Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=3,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[ModelCheckpoint(folder, monitor="val_loss")],
    )
    trainer.fit(TextClassifier(**sizes, **limits, **dropouts))
    accuracy, loss = (trainer.callback_metrics[name].item() for name in ("val_accuracy", "val_loss"))
    trainer.print(f"accuracy {accuracy:.3f}, loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
