"""A small GPT on bytes, trained on the source code of Python's standard library, or on a file of your own.

python examples/quickstart.py                       # two processes on CPU, all devices on CUDA
python examples/quickstart.py --data FILE --max-steps 1000
python examples/quickstart.py --strategy auto --devices 1
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CONTEXT = 128  # bytes that a prediction looks back at


class Windows(Dataset):
    """A text cut into windows of `CONTEXT` bytes, each with the bytes that follow."""

    def __init__(self, text: bytes):
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, d_model: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, d_model = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, d_model))
        return x + self.mlp(self.mlp_norm(x))


class ByteGPT(LightningModule):
    def __init__(self, d_model: int = 128, n_layer: int = 4, n_head: int = 4, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.bytes = nn.Embedding(256, d_model)
        self.positions = nn.Embedding(CONTEXT, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 256)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bytes(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("bits_per_byte", self.loss(batch) / math.log(2), prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        bits = self.trainer.callback_metrics["bits_per_byte"]
        self.print(f"step {self.global_step:4}: {bits:.2f} bits per byte of held-out text")

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Continue each text of the batch by 256 bytes, drawn from the model's predictions."""
        for _ in range(256):
            logits = self(batch[:, -CONTEXT:])[:, -1]
            batch = torch.cat([batch, torch.multinomial((logits / 0.7).softmax(-1), 1)], dim=1)
        return batch

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(1, steps // 10))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - steps // 10))
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [max(1, steps // 10)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read_text(file: Path | None) -> tuple[bytes, bytes]:
    """The text to train on and the text held out: every 20th file of the standard library, or the end of `file`."""
    if file is not None:
        text = file.read_bytes()
        return text[: -len(text) // 10], text[-len(text) // 10 :]
    sources = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    held_out = b"".join(sources[::20])
    return b"".join(source for i, source in enumerate(sources) if i % 20), held_out


def unigram_bits_per_byte(text: bytes, held_out: bytes) -> float:
    """What a model that knows only how often each byte occurs in `text` needs for a byte of `held_out`."""
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8), minlength=256) + 1
    return -(counts / counts.sum()).log2()[torch.frombuffer(bytearray(held_out), dtype=torch.uint8).int()].mean().item()


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text to train on; by default Python's standard library")
    parser.add_argument("--strategy", default="largescale_auto")
    parser.add_argument("--accelerator", default="cuda" if cuda else "cpu")
    parser.add_argument("--devices", type=int, default=-1 if cuda else 2)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of text, a device and step")
    args = parser.parse_args()

    seed_everything(1)
    text, held_out = read_text(args.data)
    model = ByteGPT()
    trainer = Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.max_steps,
        val_check_interval=max(1, args.max_steps // 5),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        model,
        DataLoader(Windows(text), args.batch_size, shuffle=True, drop_last=True),
        DataLoader(Windows(held_out), args.batch_size),
    )
    bits = trainer.callback_metrics["bits_per_byte"]
    # One text a process, so that every process runs the same forwards, as a sharded model needs.
    prompts = torch.frombuffer(bytearray(b"def "), dtype=torch.uint8).long().repeat(trainer.world_size, 1)
    [sample] = trainer.predict(model, DataLoader(prompts))
    if trainer.is_global_zero:
        unigram = unigram_bits_per_byte(text, held_out)
        print(f"\n{bytes(sample[0].tolist()).decode(errors='replace')}\n")
        print(f"held-out text: {bits:.2f} bits per byte, and {unigram:.2f} by a model of how often each byte occurs")


if __name__ == "__main__":
    main()
