# SPDX-License-Identifier: Apache-2.0
"""Which of a file's columns are which genes of a vocabulary, and what is wrong where they are none."""

import re
from collections import Counter

import numpy as np

from cells.dictionaries import Dictionary, setting
from cells.rank_values import Genes


# Where ids of genes are found, best first; "index" is the index of var.
ID_COLUMNS = ("index", "feature_id", "ensembl_id", "ensembl_ids", "gene_ids", "gene_id", "var_feature_id")
ENSEMBL = re.compile(r"^(?:[A-Z0-9.]+_+)?ENS([A-Z]*)G\d{6,}", re.IGNORECASE)  # also GRCh38_ENSG..., of two genomes
SPECIES = {"": "human", "MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig"}
MIXED = 0.01  # of the genes with Ensembl ids: below it, spike-ins and viruses


def match(where: str, section: str, columns: dict[str, list[str]], wanted: str | None, dictionary: Dictionary,
          mixed: bool = False) -> tuple[Genes, list[str], str]:  # fmt: skip
    """What the columns of a file's matrix are, their names, and a note; `columns` are names by where they stand.

    Raises ValueError where `wanted` is not there, no gene is known, or genes are of several species (unless `mixed`).
    """
    if wanted is not None and wanted not in columns:
        raise ValueError(
            f"{setting(section, 'gene_column')}={wanted}: {where} has no such column; it has {', '.join(columns)}."
        )
    asked = [wanted] if wanted is not None else [name for name in ID_COLUMNS if name in columns]
    if not asked:
        raise ValueError(
            f"{where} has no column of gene ids; {setting(section, 'gene_column')} names one of {', '.join(columns)}."
        )
    found = {name: [dictionary.gene(gene) for gene in columns[name]] for name in asked}
    counts = {name: sum(gene is not None for gene in genes) for name, genes in found.items()}
    chosen = max(asked, key=lambda name: (counts[name], -asked.index(name)))
    names = columns[chosen]
    if dictionary.tokens is None and wanted is None:  # every name is a gene: ids before symbols
        chosen = max(asked, key=lambda name: (sum(bool(ENSEMBL.match(one)) for one in columns[name]),
                                              -asked.index(name)))  # fmt: skip
        names = columns[chosen]
    if not mixed and (sentence := several_species(section, names)):
        raise ValueError(f"{where}: {sentence}")
    if not names:
        raise ValueError(f"{where} has no genes.")
    if dictionary.tokens is not None and not counts[chosen]:
        raise ValueError(f"{where}: {unknown(section, columns[asked[0]], asked[0])}")
    numbers: dict[str, int] = {}
    place = np.array([-1 if gene is None else numbers.setdefault(gene, len(numbers)) for gene in found[chosen]],
                     dtype=np.int64)  # fmt: skip
    if dictionary.tokens is None:
        tokens, medians = np.arange(len(numbers)), np.ones(len(numbers))
    else:
        tokens = np.array([dictionary.known[gene][0] for gene in numbers])
        medians = np.array([dictionary.known[gene][1] for gene in numbers])
    repeated = int((place >= 0).sum()) - len(numbers)
    note = f"{len(numbers):,} of {len(names):,} genes known, by var's {chosen}"
    note += f"; {repeated:,} repeated, whose counts are summed" if repeated else ""
    kind = np.int32 if len(tokens) and tokens.max() > 65_535 else np.uint16
    return Genes(place, tokens.astype(kind), medians, repeated > 0), names, note


def genes_of(names: list[str], dictionary: Dictionary) -> list[str]:
    """The ids of the genes that `match` has numbered, in that order."""
    found = dict.fromkeys(gene for name in names if (gene := dictionary.gene(name)) is not None)
    return list(found)


def unknown(section: str, names: list[str], column: str) -> str:
    """Why none of these genes is known, in a sentence."""
    shown = ", ".join(names[:3])
    kinds = Counter(found[1].upper() for name in names if (found := ENSEMBL.match(name.strip())))
    if not kinds:
        return (
            f"none of its {len(names):,} genes is in the vocabulary; var's {column} seems to hold symbols ({shown}): "
            f"name the column with Ensembl ids by {setting(section, 'gene_column')}, or give "
            f"{setting(section, 'gene_mapping')}, a JSON dictionary of symbols to ids."
        )
    species = SPECIES.get(kind := kinds.most_common(1)[0][0], f"ENS{kind}")
    return (
        f"none of its {len(names):,} genes ({shown}; {species}) is in the vocabulary; is it of another species, or "
        f"medians of another model? {setting(section, 'gene_mapping')} can map ids to those of the vocabulary."
    )


def several_species(section: str, names: list[str]) -> str | None:
    """A sentence where genes are of more than one species."""
    first: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    for name in names:
        if found := ENSEMBL.match(name.strip()):
            kind = found[1].upper()
            first.setdefault(kind, name)
            kinds[kind] += 1
    often = [kind for kind, count in kinds.most_common() if count > MIXED * kinds.total()]
    if len(often) < 2:
        return None
    shown = " and ".join(f"{SPECIES.get(kind, f'ENS{kind}')} ({kinds[kind]:,}, as {first[kind]})" for kind in often)
    way = f"{setting(section, 'bad_cells')}=leave_out reads the vocabulary's genes alone"
    return f"its genes are of several species: {shown}; split it by species, or {way}."
