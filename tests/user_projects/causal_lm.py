"""A Llama built from its config in `configure_model` learns to count; `generate` runs inside `predict_step`."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 24


class Counting(Dataset):
    """Numbers that go up by one, two or three, modulo the vocabulary."""

    def __len__(self):
        return VOCAB * 3

    def __getitem__(self, index):
        return (torch.arange(16) * (1 + index % 3) + index // 3) % VOCAB


class CausalLM(LightningModule):
    def __init__(self, hidden_size=32, layers=2, lr=1e-2, batch_size=24):
        super().__init__()
        self.save_hyperparameters()
        self.model = None

    def configure_model(self):
        if self.model is not None:
            return
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.hparams.hidden_size,
            intermediate_size=2 * self.hparams.hidden_size,
            num_hidden_layers=self.hparams.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, tokens, batch_idx):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens, batch_idx):
        self.log("val_loss", self.model(input_ids=tokens, labels=tokens).loss, sync_dist=True)

    def on_validation_epoch_end(self):
        self.log("perplexity", self.trainer.callback_metrics["val_loss"].exp(), sync_dist=True)

    def predict_step(self, prompts, batch_idx):
        return self.model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False
        )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    def loader(self):
        data, world = Counting(), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.hparams.batch_size // world, sampler=sampler)

    train_dataloader = val_dataloader = loader


def main(strategy="largescale_auto", accelerator="cpu", devices=2, folder="runs"):
    seed_everything(1)
    options = {"strategy": strategy, "accelerator": accelerator, "devices": devices, "logger": False}
    trainer = Trainer(**options, max_epochs=25, use_distributed_sampler=False, default_root_dir=folder)
    model = CausalLM()
    trainer.fit(model)
    trainer.save_checkpoint(f"{folder}/causal_lm.ckpt", weights_only=True)
    loss, perplexity = (trainer.callback_metrics[name].item() for name in ("val_loss", "perplexity"))
    prompts = torch.stack([Counting()[index][:6] for index in range(2 * devices)])
    continued = torch.cat(trainer.predict(model, DataLoader(prompts, batch_size=2)))
    trainer.print(continued.tolist())
    trainer.print(f"loss {loss:.4f}, perplexity {perplexity:.3f}")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    main(**vars(parser.parse_args()))
