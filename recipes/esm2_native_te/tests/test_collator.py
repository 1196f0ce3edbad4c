# SPDX-License-Identifier: Apache-2.0
"""Which residues are masked and by what, and that padded and packed batches say the same."""

from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from collator import MASK, PAD, MaskedLMCollator, mask_tokens
from common.contract.ranks import content, excess_chi_square
from tokens.layout import IGNORED, select_tokens


AMINO_ACIDS = range(4, 24)
CLS, EOS = 0, 2


def sample(lengths=(17, 5, 40, 3), name=(0, 0, 0), seed=1) -> dict:
    """Sequences of so many tokens with <cls> and <eos>, ambiguous residues included."""
    random = np.random.default_rng(seed)
    return {"name": name, "items": [np.r_[CLS, random.integers(4, 29, n - 2), EOS] for n in lengths]}


def collate(packed: bool, multiple: int = 1, seed: int = 3, **options):
    return MaskedLMCollator(packed, seed, 0.3, multiple)(sample(**options))


# ---- the masks


@pytest.fixture(scope="module")
def many_draws() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(4, 24, 400_000)
    return tokens, *mask_tokens(tokens, 0.15, np.random.default_rng(1))


def test_15_percent_are_chosen(many_draws):
    chosen = int((many_draws[2] != IGNORED).sum())
    counts = np.array([chosen, 400_000 - chosen])
    assert excess_chi_square(counts, np.array([60_000, 340_000]), 1) < 5


def test_of_the_chosen_80_are_masked_10_random_10_kept(many_draws):
    tokens, masked, labels = many_draws
    chosen = labels != IGNORED
    is_mask, is_same = masked[chosen] == MASK, masked[chosen] == tokens[chosen]
    counts = np.array([is_mask.sum(), is_same.sum(), (~is_mask & ~is_same).sum()])
    # A random amino acid is the old one 1 time in 20.
    assert excess_chi_square(counts, np.array([0.8, 0.105, 0.095]) * chosen.sum(), 2) < 5


def test_random_residues_are_the_20_amino_acids(many_draws):
    tokens, masked, labels = many_draws
    changed = masked[(labels != IGNORED) & (masked != MASK) & (masked != tokens)]
    assert set(changed.tolist()) == set(AMINO_ACIDS)
    counts = np.bincount(changed, minlength=24)[4:]
    assert excess_chi_square(counts, len(changed) / 20, 19) < 5


def test_labels_are_the_old_tokens_and_the_rest_is_untouched(many_draws):
    tokens, masked, labels = many_draws
    chosen = labels != IGNORED
    assert np.array_equal(labels[chosen], tokens[chosen])
    assert np.array_equal(masked[~chosen], tokens[~chosen])


def test_special_tokens_are_never_masked():
    tokens = np.repeat(np.arange(33), 200)
    masked, labels = mask_tokens(tokens, 0.999, np.random.default_rng(0))
    special = (tokens < 4) | (tokens > 28)
    assert (labels[special] == IGNORED).all() and np.array_equal(masked[special], tokens[special])
    assert set(tokens[labels != IGNORED].tolist()) == set(range(4, 29))  # ambiguous residues are masked as others


# ---- the layouts


@pytest.mark.parametrize("multiple", [1, 16])
def test_layouts_mask_the_same_residues(multiple):
    padded, packed = (collate(packed, multiple).inputs for packed in (False, True))
    present = padded["attention_mask"].bool()
    num_tokens = int(present.sum())
    for key in ("input_ids", "labels"):
        assert torch.equal(padded[key][present], packed[key][:num_tokens])
    assert (padded["labels"] != IGNORED).sum() == (packed["labels"] != IGNORED).sum() > 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed, name", [(3, (0, 2, 1)), (3, (1, 1, 2)), (4, (0, 1, 2))])
def test_masks_belong_to_seed_and_name(packed, seed, name):
    first = collate(packed, name=(0, 1, 2))
    assert content(first) == content(collate(packed, name=(0, 1, 2)))
    assert not torch.equal(first.inputs["labels"], collate(packed, seed=seed, name=name).inputs["labels"])


@pytest.mark.parametrize("multiple", [1, 8, 16, 128])
def test_packed(multiple):
    batch = collate(True, multiple)
    lengths = [17, 5, 40, 3]
    extra = -65 % multiple
    assert batch.inputs["input_ids"].dtype == batch.inputs["labels"].dtype == torch.int64
    assert batch.inputs["cu_seqlens"].dtype == torch.int32
    # What fills up to the multiple is a sequence of its own, of pads without labels.
    assert batch.inputs["cu_seqlens"].diff().tolist() == lengths + ([extra] if extra else [])
    assert batch.inputs["max_seqlen"] == max(40, extra)
    assert batch.inputs["input_ids"].shape == batch.inputs["labels"].shape == (65 + extra,)
    assert (batch.inputs["input_ids"][65:] == PAD).all() and (batch.inputs["labels"][65:] == IGNORED).all()
    assert (batch.inputs["input_ids"][:65] != PAD).all()
    assert batch.inputs["seq_lens"] == lengths + ([extra] if extra else [])


@pytest.mark.parametrize("multiple, width", [(1, 40), (8, 40), (16, 48)])
def test_padded(multiple, width):
    batch = collate(False, multiple)
    assert batch.inputs["input_ids"].shape == batch.inputs["labels"].shape == (4, width)
    mask = batch.inputs["attention_mask"]
    assert mask.sum(1).tolist() == [17, 5, 40, 3]
    assert (mask.diff(dim=1) <= 0).all()  # pads stand behind the tokens
    assert torch.equal(batch.inputs["input_ids"] == PAD, mask == 0)
    assert (batch.inputs["labels"][mask == 0] == IGNORED).all()


@pytest.mark.parametrize(
    "packed, multiple, num_slots", [(True, 1, 65), (True, 16, 80), (False, 1, 160), (False, 16, 192)]
)
def test_counts(packed, multiple, num_slots):
    batch = collate(packed, multiple)
    assert batch.counts.keys() == {"labels", "tokens", "token_pairs"}
    assert (batch.counts["tokens"], batch.num_slots) == (65, num_slots)
    assert batch.counts["labels"] == (batch.inputs["labels"] != IGNORED).sum() > 0
    assert batch.counts["token_pairs"] == 17**2 + 5**2 + 40**2 + 3**2  # without what pads


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("multiple, num_parts", [(1, 1), (16, 1), (16, 2), (16, 4)])
def test_selected_tokens_are_those_of_the_ranks_part(packed, multiple, num_parts):
    lengths = (170, 50, 400, 30)
    labels = collate(packed, multiple, lengths=lengths).inputs["labels"].flatten()
    for part in range(num_parts):
        batch = MaskedLMCollator(packed, 3, 0.3, multiple, part, num_parts)(sample(lengths))
        selected = batch.inputs["selected"]
        assert selected.dtype == torch.int64
        assert selected.tolist() == select_tokens(labels.chunk(num_parts)[part].numpy()).tolist()
        assert torch.equal(batch.inputs["labels"].flatten(), labels)  # of the whole micro-batch, on each rank
        assert batch.counts["labels"] == (labels != IGNORED).sum()


@pytest.mark.parametrize("packed", [False, True])
def test_uncounted(packed):
    batch = collate(packed)
    empty = batch.uncounted()
    assert empty.counts == {"labels": 0, "tokens": 0, "token_pairs": 0} and empty.num_slots == 0
    assert (empty.name, empty.inputs) == (batch.name, batch.inputs)
    assert batch.counts["labels"] > 0 and batch.num_slots > 0  # the first one is as it was


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_from_a_worker_is_the_same_and_takes_no_shared_memory(packed):
    batch = collate(packed)
    sent = bytes(ForkingPickler.dumps(batch))
    assert b"rebuild_tensor" not in sent
    received = ForkingPickler.loads(sent)
    assert content(received) == content(batch)
    for key, value in batch.inputs.items():
        if isinstance(value, torch.Tensor):
            assert received.inputs[key].dtype == value.dtype
            received.inputs[key][0] = 0  # it can be written to
    assert content(batch) == content(collate(packed))


def test_to_moves_every_tensor():
    batch = collate(True).to(torch.device("meta"))
    assert {v.device.type for v in batch.inputs.values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert batch.inputs["max_seqlen"] == 40
