# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for plain `transformers` that reads a protein by the rules of training, cleaning included."""

from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tokens.protein_rows import Alphabet


def residue_tokenizer(vocabulary: list[str], alphabet: Alphabet, max_length: int) -> PreTrainedTokenizerFast:
    """One token a residue, between those of start and end; `vocabulary` has them all in the order of their ids.

    Lower case counts as upper case; gaps and white space are dropped, stops dropped at the end; all else becomes the
    alphabet's unknown one. Special tokens are written out: `MK<mask>L`.
    """
    rules = [Replace(Regex(r"[*\-. \t\r\n]+\z"), ""), Replace(Regex(r"[\-. \t\r\n]"), "")]
    rules += [Replace(letter.lower(), letter) for letter in alphabet.residues]
    if alphabet.unknown in alphabet.signs:  # a letter; else signs that the vocabulary lacks become <unk> by themselves
        rules += [Replace(Regex(f"[^{alphabet.signs}]"), alphabet.unknown)]
    reader = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    reader.normalizer = Sequence(rules)
    reader.pre_tokenizer = Split(Regex("."), "isolated")
    start, end = (vocabulary[token[0]] for token in (alphabet.start, alphabet.end))
    ends = [(token, vocabulary.index(token)) for token in (start, end)]
    reader.post_processor = TemplateProcessing(f"{start} $A {end}", f"{start} $A {end} $B:1 {end}:1", ends)
    names = {f"{token[1:-1]}_token": token for token in (start, "<pad>", end, "<unk>", "<mask>")}
    return PreTrainedTokenizerFast(
        tokenizer_object=reader, model_max_length=max_length, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"], **names,
    )  # fmt: skip


def save_tokenizer(folder: Path, vocabulary: list[str], alphabet: Alphabet, max_length: int) -> None:
    """Beside a final model, for `transformers` 4.x as well."""
    residue_tokenizer(vocabulary, alphabet, max_length).save_pretrained(folder)
    names = folder / "tokenizer_config.json"
    names.write_text(names.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
