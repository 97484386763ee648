"""A small training loop: a tiny Llama on packed sequences drawn from a mixture of domains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergemix.demo.settings import Horizon, Shape
from mergemix.demo.tokenizer import BOS, EOS, PAD, VOCABULARY, encode_document


class Packed:
    """Documents of one domain end to end; a sequence starts at a document and runs into the next ones."""

    def __init__(self, documents: Sequence[str], length: int) -> None:
        encoded = [encode_document(text) for text in documents]
        lengths = torch.tensor([len(ids) for ids in encoded])
        self.tokens = torch.tensor([i for ids in encoded for i in ids])
        starts = lengths.cumsum(0) - lengths
        self.starts = starts[starts + length <= len(self.tokens)]
        self.length = length
        if not len(self.starts):
            raise ValueError(f"a corpus of {len(self.tokens)} tokens has no sequence of {length}")

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count, length] token ids."""
        starts = self.starts[torch.randint(len(self.starts), (count,), generator=generator)]
        return self.tokens[starts[:, None] + torch.arange(self.length)]


def build_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 model; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=64 * -(-len(VOCABULARY) // 64),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def mixture_batches(
    corpora: Mapping[str, Packed], shares: Mapping[str, float], batch: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless batches [batch, length]; each sequence comes from a domain drawn with probability `shares`."""
    names = list(shares)
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.tensor([shares[name] for name in names])
    while True:
        counts = (
            torch.multinomial(probabilities, batch, replacement=True, generator=generator)
            .bincount(minlength=len(names))
            .tolist()
        )
        yield torch.cat([corpora[n].sample(count, generator) for n, count in zip(names, counts, strict=True)])


def train(
    model: LlamaForCausalLM,
    batches: Iterator[torch.Tensor],
    horizon: Horizon,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place with AdamW; returns each step's loss, in nats a token.

    The optimiser's settings are those of the paper (arXiv 2601.17858): b1 0.9, b2 0.95, weight decay 0.1.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=horizon.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    losses = []
    model.train()
    for step in range(horizon.steps):
        for group in optimizer.param_groups:
            group["lr"] = horizon.rate(step)
        tokens = next(batches)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    model.eval()
    return losses
