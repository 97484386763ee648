"""Families that are really trained, in seconds: a tiny base on four small skills, and one expert of each."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mergemix.demo.corpora import Corpora, make_corpora
from mergemix.demo.tokenizer import BOS, EOS, PAD, VOCABULARY, build_tokenizer, encode_document

DOMAINS = ("math", "code", "language")
LENGTH, BATCH = 32, 16
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "bos_token_id": VOCABULARY[BOS], "eos_token_id": VOCABULARY[EOS], "pad_token_id": VOCABULARY[PAD],
}  # fmt: skip


class Trainer:
    """Base and experts below `root`. Everything depends on seeds only."""

    def __init__(self, root: Path, *, moe: bool = False) -> None:
        self.root = root
        self.moe = moe
        self.corpora: Corpora = make_corpora(0, documents=1500, items=32, people=10)
        self._tokens = {
            domain: torch.tensor(
                [i for text in self.corpora.documents[domain] for i in encode_document(text)]
            )
            for domain in DOMAINS
        }

    def base(self, name: str, seed: int, *, steps: int = 150) -> Path:
        """Trained on all domains, with a learning rate that falls."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = (
                Qwen3MoeForCausalLM(
                    Qwen3MoeConfig(
                        **SIZES,
                        num_experts=8,
                        num_experts_per_tok=2,
                        moe_intermediate_size=32,
                        norm_topk_prob=True,
                    )
                )
                if self.moe
                else LlamaForCausalLM(LlamaConfig(**SIZES))
            )
        even = dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
        train(model, self._batches(even, seed), [4e-3 * (1 - 0.9 * step / steps) for step in range(steps)])
        return self._save(model, name)

    def expert(self, base: Path, name: str, domain: str, rate: float, *, steps: int = 30) -> Path:
        """Half general data, the same for every expert, and a constant learning rate."""
        model = load(base)
        even = dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
        halves = zip(
            self._batches(even, 1, BATCH // 2), self._batches({domain: 1.0}, 2, BATCH // 2), strict=True
        )
        train(model, map(torch.cat, halves), [rate] * steps)
        return self._save(model, name)

    def family(self, base: Path, name: str, rates: Mapping[str, float]) -> dict[str, str]:
        """An expert of each domain, by its rate."""
        return {
            domain: str(self.expert(base, f"{name}-{domain}", domain, rate)) for domain, rate in rates.items()
        }

    def held_out(self) -> dict[str, Path]:
        """A file of text of each domain that nobody was trained on."""
        paths = {}
        for domain in DOMAINS:
            paths[domain] = self.root / f"{domain}.jsonl"
            items = self.corpora.test[domain]
            lines = (json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items)
            paths[domain].write_text("\n".join(lines))
        return paths

    def _batches(self, shares: Mapping[str, float], seed: int, count: int = BATCH) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        names, weights = list(shares), torch.tensor(list(shares.values()))
        while True:
            rows = []
            for k in torch.multinomial(weights, count, replacement=True, generator=generator).tolist():
                tokens = self._tokens[names[k]]
                begin = int(torch.randint(len(tokens) - LENGTH, (1,), generator=generator))
                rows.append(tokens[begin : begin + LENGTH])
            yield torch.stack(rows)

    def _save(self, model: Any, name: str) -> Path:
        path = self.root / name
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
        build_tokenizer(SIZES["max_position_embeddings"]).save_pretrained(path)
        return path


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def train(model: Any, batches: Iterator[torch.Tensor], rates: list[float]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
