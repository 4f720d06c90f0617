"""Small models of well-known families, by config with random weights, with what they are trained on."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from models import divided_loader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

VOCAB, WIDTH, HEADS, LENGTH = 66, 32, 4, 8
_USUAL = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GROUPED = {**_USUAL, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
_IMAGES = {"image_size": 16, "patch_size": 4, "num_channels": 3}


class _Torch(nn.Module):
    """A language model of torch's own layers, with encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Transformer(WIDTH, HEADS, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        logits = self.head(self.body(x, x, tgt_mask=mask, tgt_is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class _Attention(nn.Module):
    """Blocks around nn.MultiheadAttention that asks for its weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(_AttentionBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class _AttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        y = self.norm(x)
        attended, _ = self.attention(y, y, y, key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool))
        return x + self.mlp(x + attended)


def _by_config(model: str, config: str, **fields):
    def build():
        import transformers

        made = getattr(transformers, f"{config}Config")(**fields)
        return getattr(transformers, model)(made)

    return build


def _lora():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    return peft.get_peft_model(FAMILIES["llama"](), config)


_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": LENGTH}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 1, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
FAMILIES = {
    "llama": _by_config("LlamaForCausalLM", "Llama", **_GROUPED),
    "mistral": _by_config("MistralForCausalLM", "Mistral", **_GROUPED),
    "qwen3": _by_config("Qwen3ForCausalLM", "Qwen3", **_GROUPED),
    "gpt2": _by_config("GPT2LMHeadModel", "GPT2", **_GPT2),
    "opt": _by_config(
        "OPTForCausalLM",
        "OPT",
        **{**_USUAL, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": LENGTH},
        dropout=0.0,
    ),
    "bert": _by_config("BertForMaskedLM", "Bert", **_USUAL, **_NO_DROPOUT),
    "t5": _by_config(
        "T5ForConditionalGeneration",
        "T5",
        d_model=WIDTH,
        d_ff=64,
        num_layers=2,
        num_heads=HEADS,
        d_kv=WIDTH // HEADS,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    ),
    "vit": _by_config("ViTForImageClassification", "ViT", **_USUAL, **_NO_DROPOUT, **_IMAGES, num_labels=6),
    "convnext": _by_config(
        "ConvNextForImageClassification", "ConvNext", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=6
    ),
    "lora": _lora,
    "torch": _Torch,
    "attention": _Attention,
}
DECODERS = ("llama", "mistral", "qwen3", "gpt2", "opt")


class Samples(Dataset):
    """Made-up tokens or images: each sample follows from its index."""

    def __init__(self, name: str):
        self.name = name

    def __len__(self):
        return 160

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        if self.name in ("vit", "convnext"):
            return {
                "pixel_values": torch.randn(3, 16, 16, generator=generator),
                "labels": torch.randint(6, (), generator=generator),
            }
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
        return {"input_ids": ids, "labels": ids.roll(-1)}


class Family(LightningModule):
    """Trains one of `FAMILIES`, its weights those of the seed."""

    def __init__(self, name: str, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.name, self.model = name, FAMILIES[name]()
        self.losses: list[float] = []

    def training_step(self, batch, index):
        result = self.model(**batch)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return divided_loader(self.trainer, Samples(self.name))
