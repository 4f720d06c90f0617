"""A small causal LM is trained on one language, frozen, and adapted to another by LoRA; only the adapter is kept."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB = 20


class Language(Dataset):
    """Sequences in which each token is the one before plus `step`."""

    def __init__(self, step):
        self.step = step

    def __len__(self):
        return 4 * VOCAB

    def __getitem__(self, index):
        return (index + self.step * torch.arange(12)) % VOCAB


class LM(LightningModule):
    def __init__(self, step=1, lr=1e-2, batch_size=16):
        super().__init__()
        self.save_hyperparameters()
        config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        self.model = GPT2LMHeadModel(config)

    def training_step(self, tokens, batch_idx):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens, batch_idx):
        self.log("val_loss", self.model(input_ids=tokens, labels=tokens).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.hparams.lr)

    def loader(self):
        data, world = Language(self.hparams.step), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    train_dataloader = val_dataloader = loader


class Adapted(LM):
    def __init__(self, base, rank=8, step=3, lr=3e-2, batch_size=16):
        super().__init__(step, lr, batch_size)
        self.save_hyperparameters()
        self.strict_loading = False
        self.model.load_state_dict(LM.load_from_checkpoint(base).model.state_dict())
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        self.model = get_peft_model(self.model, lora)

    def on_fit_start(self):
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        self.print(f"training {trained} of {sum(parameter.numel() for parameter in self.parameters())} parameters")

    def on_save_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weight for name, weight in weights.items() if "lora_" in name}


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)

    def fit(model, name, epochs):
        trainer = Trainer(
            strategy=strategy,
            accelerator=accelerator,
            devices=devices,
            max_epochs=epochs,
            logger=False,
            use_distributed_sampler=False,
            callbacks=[ModelCheckpoint(folder, name, save_weights_only=True)],
        )
        trainer.fit(model)
        return trainer

    fit(LM(), "base", epochs=8)
    seed_everything(2)
    adapted = Adapted(f"{folder}/base.ckpt")
    trainer = fit(adapted, "adapter", epochs=12)
    loss = trainer.callback_metrics["val_loss"].item()
    # Adapters are merged into the base, on one process, as they would be to deploy the model.
    merged = Adapted.load_from_checkpoint(f"{folder}/adapter.ckpt").model.merge_and_unload().eval()
    language = Language(step=3)
    tokens = torch.stack([language[index] for index in range(len(language))])
    with torch.no_grad():
        deployed = merged(input_ids=tokens, labels=tokens).loss.item()
    trainer.print(f"loss {loss:.4f}, merged {deployed:.4f}")
    return deployed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
