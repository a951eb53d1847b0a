"""The tokenizer: byte-level BPE with 4096 entries, in which lines and digits stay apart.

Text is cut before any merge, so no token mixes a newline with anything else, every newline and every digit is one
token, and a line's tokens do not depend on the lines around it: the tokens of a text are those of its lines, joined.
`<ANCHOR>` is reserved for the model that puts one after each newline.
"""

import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from kvlib.minilm import BUILD, MODEL
from kvlib.minilm.corpus import load

SIZE = 4096
SPECIAL = ("<s>", "</s>", "<pad>", "<ANCHOR>")  # ids 0 to 3
BOS, EOS, PAD, ANCHOR = range(4)
SAMPLE_BYTES = 24_000_000  # merges hardly change beyond this
LENGTH = 4096  # positions of the model

# newline | digit | run of two or more blanks (indentation) | word | punctuation | any single blank
PIECES = r"\n|\p{N}|[^\S\n]{2,}| ?[\p{L}\p{M}_]+| ?[^\s\p{L}\p{M}\p{N}_]+|[^\S\n]"


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn the merges; the first ids are the special tokens, then the 256 bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<ANCHOR>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,  # it would delete blanks and break decode(encode(x)) == x
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def build() -> None:
    """Train on a sample of the corpus and save into data/models/minilm."""
    texts = load(BUILD / "corpus" / "train-code.jsonl") + load(BUILD / "corpus" / "train-prose.jsonl")
    random.Random(0).shuffle(texts)
    sample, size = [], 0
    for text in tqdm(texts, desc="sample"):
        if size < SAMPLE_BYTES:
            sample.append(text)
            size += len(text)
    train(sample).save_pretrained(MODEL)


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text without BOS; a literal "</s>" in a text stays text, so documents cannot end early."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False
