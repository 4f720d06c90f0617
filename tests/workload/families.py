"""Tiny modules of many families, each with a batch, for parity of the fake step with the real one."""

import dataclasses
import random
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import LightningModule
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(LightningModule):
    def __init__(self, *, vocabulary=64, width=32, heads=2, layers=3, length=16, dropout=0.0, tied=False, frozen=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        if frozen:
            for part in (self.tokens, self.positions, self.blocks[0], self.blocks[1]):
                part.requires_grad_(False)

    def forward(self, x):
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten())
        self.log("loss", loss)
        return loss

    validation_step = training_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)]


def tokens(samples=4, length=16, vocabulary=64):
    data = torch.randint(0, vocabulary, (samples, length + 1), generator=torch.Generator().manual_seed(0))
    return data[:, :-1].contiguous(), data[:, 1:].contiguous()


class Wrapped(LightningModule):
    """Any module as a LightningModule: its loss is the model's own, or the sum of what it returns."""

    def __init__(self, model, loss=None, optimizer=torch.optim.SGD):
        super().__init__()
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def training_step(self, batch, batch_idx):
        if self.loss is not None:
            return self.loss(self.model, batch)
        out = self.model(**batch) if isinstance(batch, dict) else self.model(batch)
        return out.loss if hasattr(out, "loss") else out.float().pow(2).mean()

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Reader(LightningModule):
    """Takes its two tensors out of a batch of any kind."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(8, 3), read

    def training_step(self, batch):
        x, y = self.read(batch)
        return {"loss": F.cross_entropy(self.layer(x), y), "extra": y}

    def configure_optimizers(self):
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1)}


def two_tensors():
    return torch.randn(4, 8), torch.randint(0, 3, (4,))


class Metered(Reader):
    """Keeps books of many kinds while it trains."""

    def __init__(self):
        super().__init__(lambda b: b)
        self.accuracy = torchmetrics.MeanMetric()
        self.metrics = torchmetrics.MetricCollection(
            [torchmetrics.classification.MulticlassAccuracy(3), torchmetrics.classification.MulticlassF1Score(3)]
        )
        self.curve = torchmetrics.CatMetric()
        self.norm = nn.BatchNorm1d(8)
        self.history, self.best, self.count = [], {}, 0

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        logits = self.layer(self.norm(x))
        loss = F.cross_entropy(logits, y)
        self.accuracy(loss)
        self.metrics(logits, y)
        self.curve.update(loss.detach())
        self.history.append(loss.detach())
        self.best["loss"] = loss.item()
        self.count += 1
        self.log("accuracy", self.accuracy, on_step=True)
        self.log_dict(self.metrics.compute())
        random.random()
        numpy.random.rand()
        self.layer.last = logits
        self.layer.register_forward_hook(lambda *_: None)
        self.trainer.should_stop = True
        return loss


class GAN(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.critic = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(), nn.Linear(32, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_critic)
        made = self.generator(torch.randn(len(batch), 8, device=batch.device))
        critic_loss = F.softplus(self.critic(made.detach())).mean() + F.softplus(-self.critic(batch)).mean()
        for_critic.zero_grad()
        self.manual_backward(critic_loss)
        self.clip_gradients(for_critic, gradient_clip_val=1.0)
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        self.toggle_optimizer(for_generator)
        generator_loss = F.softplus(-self.critic(self.generator(torch.randn(len(batch), 8)))).mean()
        for_generator.zero_grad()
        self.manual_backward(generator_loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.seen.append(generator_loss.detach())
        self.log_dict({"g": generator_loss, "c": critic_loss}, prog_bar=True)
        self.print(self.global_step, self.current_epoch, self.all_gather(generator_loss))

    def configure_optimizers(self):
        both = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.critic)]
        return both, [torch.optim.lr_scheduler.StepLR(one, 10) for one in both]


class WithPenalty(Wrapped):
    """A gradient penalty: the gradient of a gradient."""

    def training_step(self, batch, batch_idx):
        batch = batch.requires_grad_()
        score = self.model(batch).sum()
        (slope,) = torch.autograd.grad(score, batch, create_graph=True)
        return score + slope.pow(2).sum()


class EncoderDecoder(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(width, 2, 32, batch_first=True) for _ in range(2)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(width, 2, 32, batch_first=True) for _ in range(2)])

    def forward(self, x):
        memory, y = x, x
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            y = layer(y, memory)
        return y


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(8, 16, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Shared(nn.Module):
    """One block run four times, between two of another class."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16)] * 4)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList([Block(16, 2, 0.1) for _ in range(3)])

    def forward(self, x):
        x = x * torch.ones(1, requires_grad=True)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Branching(nn.Module):
    """Decides by the values of its input."""

    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        if bool((x > -1000).all()):
            for block in self.blocks:
                x = torch.relu(block(x))
        return x


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "sample"


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def _transformers(kind, **settings):
    import transformers

    model = getattr(transformers, kind)
    return Wrapped(model(model.config_class(**settings)), optimizer=torch.optim.AdamW)


def _ids(*names, samples=2, length=12, vocabulary=64):
    return {name: torch.randint(0, vocabulary, (samples, length)) for name in names}


_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def lora():
    import peft

    model = peft.get_peft_model(
        _transformers("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32).model,
        peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    return Wrapped(model, optimizer=torch.optim.AdamW), _ids("input_ids", "labels")


FAMILIES = {
    "mlp": lambda: (
        Wrapped(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))),
        torch.randn(4, 8),
    ),
    "gpt": lambda: (GPT(), tokens()),
    "dropout": lambda: (GPT(dropout=0.1), tokens()),
    "tied": lambda: (GPT(tied=True), tokens()),
    "frozen": lambda: (GPT(frozen=True), tokens()),
    "convolutions": lambda: (Wrapped(convolutions()), torch.randn(4, 3, 16, 16)),
    "gan": lambda: (GAN(), torch.randn(4, 16)),
    "penalty": lambda: (WithPenalty(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))), torch.randn(4, 8)),
    "encoder_decoder": lambda: (Wrapped(EncoderDecoder()), torch.randn(2, 6, 16)),
    "shared": lambda: (Wrapped(Shared()), torch.randn(4, 16)),
    "gru": lambda: (Wrapped(Recurrent(nn.GRU)), torch.randn(4, 6, 8)),
    "checkpoint": lambda: (Wrapped(Checkpointed(reentrant=False)), torch.randn(2, 6, 16)),
    "reentrant": lambda: (Wrapped(Checkpointed(reentrant=True)), torch.randn(2, 6, 16)),
    "gpt2": lambda: (
        _transformers("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
        _ids("input_ids", "labels"),
    ),
    "llama": lambda: (
        _transformers("LlamaForCausalLM", vocab_size=64, num_key_value_heads=1, **_WIDTHS),
        _ids("input_ids", "labels"),
    ),
    "bert": lambda: (
        _transformers("BertForMaskedLM", vocab_size=64, max_position_embeddings=32, **_WIDTHS),
        _ids("input_ids", "labels"),
    ),
    "t5": lambda: (
        _transformers(
            "T5ForConditionalGeneration", vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=0,
        ),
        _ids("input_ids", "labels"),
    ),
    "vit": lambda: (
        _transformers("ViTForImageClassification", image_size=16, patch_size=4, num_labels=2, **_WIDTHS),
        {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])},
    ),
    "lora": lora,
}  # fmt: skip
