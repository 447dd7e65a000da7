"""The starter model's tokenizer: byte-pair encoding over characters, with bytes for every character it does not know.

    python recipes/starter/train_tokenizer.py --prose DIR [--out recipes/starter/tokenizer]

4,096 entries: special tokens, the 256 bytes, then pieces learned from a 25 MB sample of the prose corpus. A piece is a
word with the space before it, a run of punctuation with the space before it, one digit, a run of spaces, or one or two
newlines; no piece holds two of these, so numbers are read digit by digit and a paragraph break is one token.

Pieces hold the space itself and not a stand-in character, and there is no normaliser: for every text,
decode(encode(text)) == text.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from prepare_corpus import all_documents, is_validation
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 4096
CONTEXT_TOKENS = 2048
SAMPLE_BYTES = 25_000_000
ALPHABET_SIZE = 105  # characters with an entry of their own; the others are spelled in bytes
SPECIAL_TOKENS = [
    *("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    *(f"<|reserved_{number}|>" for number in range(10)),
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PRINTABLE = [chr(code) for code in range(0x20, 0x7F)] + ["\n", "\t"]

PIECE = "|".join(
    [
        r"'(?:s|t|d|m|re|ve|ll)(?!\p{L})",  # the ends of he's, don't, we'll
        r" ?\p{L}[\p{L}\p{M}]*",  # a word
        r"\p{N}",  # one digit, without the space: the same token wherever the number stands
        r" ?[^\s\p{L}\p{N}]+",  # punctuation and symbols
        r"\n\n?",
        r" +(?!\S)",  # spaces, but for the last, which belongs to the word
        r" +",
        r"\s",
    ]
)


def sample_documents(prose: Path, *, num_bytes: int, seed: int = 0) -> list[str]:
    """Training documents in random order until `num_bytes` are reached."""
    documents = [document for document in all_documents(prose) if not is_validation(document)]
    random.Random(seed).shuffle(documents)
    size, sample = 0, []
    for document in documents:
        if size >= num_bytes:
            break
        sample.append(document)
        size += len(document.encode("utf-8"))
    return sample


def structured_text(documents: list[str], *, num_records: int = 2_000, seed: int = 0) -> Iterator[str]:
    """JSON records and lists over words of the corpus, so that `{"`, `":`, `",` and indentation become pieces."""
    chooser = random.Random(seed)
    for _ in range(num_records):
        words = [word for word in chooser.choice(documents)[:400].lower().split() if word.isalpha()] or ["item"]
        record = {chooser.choice(words): chooser.choice(words) for _ in range(chooser.randint(1, 4))}
        nested = {**record, "items": chooser.sample(words, min(len(words), 3)), "count": chooser.randint(0, 99)}
        yield json.dumps(record, separators=chooser.choice([(",", ":"), (", ", ": ")]))
        yield json.dumps([nested], indent=chooser.choice([2, 4]))
        yield "\n".join(chooser.choice(["- ", "* "]) + word for word in words[:4])


def learn_pieces(texts: Iterator[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The learned pieces (single characters first) and merges, each in the order learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        initial_alphabet=PRINTABLE,
        limit_alphabet=ALPHABET_SIZE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]


def assemble(*, pieces: list[str], merges: list[tuple[str, str]], chat_template: str) -> PreTrainedTokenizerFast:
    """The whole tokenizer: special tokens, bytes, pieces."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces])}
    assert len(vocabulary) == VOCABULARY_SIZE, len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def name_portable_class(path: Path) -> None:
    """Name the tokenizer class as every version of transformers knows it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True, help="folder with the *.txt.xz files")
    parser.add_argument("--out", type=Path, default=here / "tokenizer", help="folder to write the tokenizer into")
    arguments = parser.parse_args()

    documents = sample_documents(arguments.prose, num_bytes=SAMPLE_BYTES)
    pieces, merges = learn_pieces(iter([*documents, *structured_text(documents)]))
    template = (here / "chat_template.jinja").read_text(encoding="utf-8")
    assemble(pieces=pieces, merges=merges, chat_template=template).save_pretrained(arguments.out)
    name_portable_class(arguments.out / "tokenizer_config.json")
    print(f"{arguments.out}: {VOCABULARY_SIZE:,} entries, {len(merges):,} merges")


if __name__ == "__main__":
    main()
