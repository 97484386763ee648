"""One token a character: an answer's tokens never depend on the prompt before them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from mergemix.demo.corpora import ALPHABET

PAD, BOS, EOS, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def vocabulary(alphabet: str) -> dict[str, int]:
    """Token ids of the special tokens, then of the characters."""
    return {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}


VOCABULARY = vocabulary(ALPHABET)


def build_tokenizer(max_length: int, alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """A character tokenizer that puts `<s>` before every text, in the format every engine reads."""
    ids = vocabulary(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=UNKNOWN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_document(text: str) -> list[int]:
    """Token ids of a training document: `<s>`, its characters, `</s>`."""
    return [VOCABULARY[BOS], *(VOCABULARY[character] for character in text), VOCABULARY[EOS]]
