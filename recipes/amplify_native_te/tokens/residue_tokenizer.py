# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for plain `transformers` that reads a protein by the rules of training, cleaning included."""

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def residue_tokenizer(vocabulary: list[str], residues: str, max_length: int) -> PreTrainedTokenizerFast:
    """One token a residue, between <cls> and <eos>; `vocabulary` has them all in the order of their ids.

    Lower case counts as upper case; gaps and white space are dropped, stops dropped at the end; all else becomes X.
    Special tokens are written out: `MK<mask>L`.
    """
    rules = [Replace(Regex(r"[*\-. \t\r\n]+\z"), ""), Replace(Regex(r"[\-. \t\r\n]"), "")]
    rules += [Replace(letter.lower(), letter) for letter in residues]
    rules += [Replace(Regex(f"[^{residues}]"), "X")]
    reader = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    reader.normalizer = Sequence(rules)
    reader.pre_tokenizer = Split(Regex("."), "isolated")
    ends = [(token, vocabulary.index(token)) for token in ("<cls>", "<eos>")]
    reader.post_processor = TemplateProcessing("<cls> $A <eos>", "<cls> $A <eos> $B:1 <eos>:1", ends)
    names = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    return PreTrainedTokenizerFast(
        tokenizer_object=reader, model_max_length=max_length, clean_up_tokenization_spaces=False, **names
    )
